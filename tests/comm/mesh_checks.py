"""The groups of a mesh, checked on every rank."""

from __future__ import annotations

import torch

from antiphon.comm import Mesh, RankGroup


def gathered_by_axis(group: RankGroup, dp: int, tp: int) -> dict[str, list[int]]:
    """This rank's index in the group of each axis, and the world ranks of that group."""
    groups = Mesh(dp=dp, tp=tp).groups(group)
    found: dict[str, list[int]] = {}
    for axis, part in zip(("dp", "tp", "ep"), groups, strict=True):
        out = torch.empty(part.size, dtype=torch.int64)
        if part.size > 1:
            part.all_gather(out, torch.tensor([group.rank]), f"ranks of {axis}").wait()
        else:
            out[0] = group.rank
        found[axis] = [part.rank, *out.tolist()]
        found[f"{axis} objects"] = part.all_gather_object(group.rank)
    for part in groups:
        if part is not group:
            part.close()
    assert group.all_gather_object("still open") == ["still open"] * group.size
    return found
