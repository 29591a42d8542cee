"""What a combine of exact routing must know of the dispatch that it answers, whoever moved the rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(slots=True, kw_only=True)
class RoutedExchange:
    """Rows by destination and source rank. A late launch fills in the counts."""

    num_tokens: int
    tokens_N: torch.Tensor  # token of every row sent, ordered by destination rank; the first sum(sent) count
    sent: list[int] = field(default_factory=list)  # rows sent to each rank
    received: list[int] = field(default_factory=list)  # rows received from each rank

    def remote_rows(self, rank: int) -> int:
        """Rows to or from other ranks than `rank`, whichever are more."""
        return max(sum(rows) - rows[rank] for rows in (self.sent, self.received))

    def add_home(self, home_ND: torch.Tensor) -> torch.Tensor:
        """The sums that came home for every token, added in order of rank, in float32 at least: [T, D], new."""
        wide = torch.promote_types(home_ND.dtype, torch.float32)
        out_TD = torch.zeros(self.num_tokens, home_ND.shape[1], dtype=wide, device=home_ND.device)
        tokens_N = self.tokens_N[: sum(self.sent)]
        for tokens, rows in zip(torch.split(tokens_N, self.sent), torch.split(home_ND, self.sent), strict=True):
            out_TD.index_add_(0, tokens, rows.to(wide))
        return out_TD.to(home_ND.dtype)
