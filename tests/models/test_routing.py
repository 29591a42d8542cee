"""Routing of dummy runs: what the option takes, how tables are balanced, and that a cut does not change them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from antiphon.comm import RankGroup, Routes, create_transport
from antiphon.core.batch import AttentionMetadata, MicroBatch, RequestSlice, use_micro_batch
from antiphon.core.errors import OptionError
from antiphon.kernels.router import Scoring
from antiphon.models import build_model, expert_shape, fill_dummy_weights, parse_routing, read_config
from antiphon.models.checkpoint.dummy_routing import RouteTable, RoutingKind, TableRouter, routing_tables
from antiphon.models.decoder import Decoder
from antiphon.models.router import Router, RoutingConfig
from antiphon.runtime import CpuStreams
from tests.models.twin import Twin, random_ids, scattered_blocks, tiny_config
from tests.support.errors import raises

SHAPES = [(128, 8), (64, 6), (256, 8), (60, 4), (12, 5), (8, 8)]  # experts, experts per token


def table_of(text: str, num_experts: int, top_k: int, *, rank: int = 0, num_ranks: int = 1) -> torch.Tensor:
    tables = routing_tables(
        parse_routing(text), num_experts=num_experts, top_k=top_k, layers=[3], rank=rank, num_ranks=num_ranks
    )
    return tables[3]


def shares(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Of all choices, which go to each expert."""
    return torch.bincount(ids.flatten(), minlength=num_experts) / ids.numel()


# ---- the option


@pytest.mark.parametrize(
    "text", ["model", "uniform", "zipf:1.2", "zipf:2", "recorded:some/routes.jsonl", "recorded:a:b"]
)
def test_the_option_and_back(text: str) -> None:
    assert str(parse_routing(text)) == text


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("unifrom", "'uniform'"),
        ("", "uniform"),
        ("uniform:2", "uniform"),
        ("zipf", "zipf:1.2"),
        ("zipf:", "zipf:1.2"),
        ("zipf:0", "zipf:1.2"),
        ("zipf:-1", "zipf:1.2"),
        ("zipf:nan", "zipf:1.2"),
        ("zipf:inf", "zipf:1.2"),
        ("zipf:steep", "zipf:1.2"),
        ("recorded", "recorded:routes.jsonl"),
        ("recorded:", "recorded:routes.jsonl"),
    ],
)
def test_an_option_that_is_wrong(text: str, remedy: str) -> None:
    with raises(OptionError, option="routing", value=text, remedy=remedy):
        parse_routing(text)


# ---- tables


@pytest.mark.parametrize("text", ["uniform", "zipf:0.5", "zipf:3"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_experts_of_a_row_are_different(shape: tuple[int, int], text: str) -> None:
    num_experts, top_k = shape
    table_NK = table_of(text, num_experts, top_k)
    assert table_NK.dtype == torch.int64
    assert table_NK.min() >= 0
    assert table_NK.max() < num_experts
    assert (table_NK.sort(dim=1).values.diff(dim=1) > 0).all()
    assert torch.equal(table_NK, table_of(text, num_experts, top_k))


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_uniform_is_balanced_in_every_window(shape: tuple[int, int], num_ranks: int) -> None:
    num_experts, top_k = shape
    table_NK = table_of("uniform", num_experts, top_k)
    for start in (0, 1, 511, 5000, len(table_NK) - 1024):
        by_expert = shares(table_NK[start : start + 1024], num_experts)
        by_rank = by_expert.view(num_ranks, -1).sum(1)
        assert float((by_rank * num_ranks - 1).abs().max()) < 0.02, start
        assert float((by_expert * num_experts - 1).abs().max()) < 0.05, start


def test_uniform_chooses_pairs_evenly() -> None:
    """A token's experts are no fixed set: each pair of experts meets as often as chance has it."""
    table_NK = table_of("uniform", 16, 4)
    chosen_NE = torch.zeros(len(table_NK), 16).scatter(1, table_NK, 1)
    together = (chosen_NE.t() @ chosen_NE)[~torch.eye(16, dtype=torch.bool)]
    expected = len(table_NK) * 4 * 3 / (16 * 15)
    assert float((together / expected - 1).abs().max()) < 0.1


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_zipf_falls_with_the_rank_in_popularity(exponent: float) -> None:
    found = shares(table_of(f"zipf:{exponent}", 64, 1), 64).sort(descending=True).values
    expected = torch.arange(1, 65).float() ** -exponent
    expected /= expected.sum()
    torch.testing.assert_close(found[:6], expected[:6], rtol=0.15, atol=0)


def test_zipf_is_steeper_with_a_larger_exponent_and_bounded() -> None:
    largest = [float(shares(table_of(f"zipf:{exponent}", 64, 4), 64).max()) for exponent in (0.3, 1.0, 3.0)]
    assert 1 / 64 < largest[0] < largest[1] < largest[2] <= 1 / 4


def test_ranks_begin_at_different_rows() -> None:
    first, second = (table_of("uniform", 64, 6, rank=rank, num_ranks=2) for rank in range(2))
    half = len(first) // 2
    assert torch.equal(first[half:], second[:half])
    assert not torch.equal(first[:half], second[:half])


# ---- recordings


def test_a_recording_is_used_layer_by_layer(tmp_path: Path) -> None:
    file = tmp_path / "routes.jsonl"
    rows = {3: [[0, 5], [1, 2], [7, 3], [4, 6]], 4: [[6, 1]]}
    file.write_text("\n".join(json.dumps({"layer": layer, "ids": ids}) for layer, ids in rows.items()) + "\n\n")
    spec = parse_routing(f"recorded:{file}")
    for rank in range(2):
        tables = routing_tables(spec, num_experts=8, top_k=2, layers=[3, 4], rank=rank, num_ranks=2)
        assert tables[3].tolist() == rows[3][2 * rank :] + rows[3][: 2 * rank]
        assert tables[4].tolist() == rows[4]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_recording_may_hold_notes_with_what_ends_lines_elsewhere(tmp_path: Path, end: str) -> None:
    lines = [
        json.dumps({"layer": layer, "note": "a\u2028b\x85c", "ids": [[0, 5]]}, ensure_ascii=False) for layer in (3, 4)
    ]
    (tmp_path / "routes.jsonl").write_text("\ufeff" + end.join(lines), encoding="utf-8", newline="")
    spec = parse_routing(f"recorded:{tmp_path / 'routes.jsonl'}")
    tables = routing_tables(spec, num_experts=8, top_k=2, layers=[3, 4], rank=0, num_ranks=1)
    assert [tables[layer].tolist() for layer in (3, 4)] == [[[0, 5]]] * 2


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ('{"layer": 4, "ids": [[0, 1]]}', "layer 3"),
        ('{"layer": 3, "ids": [[0, 1, 2]]}', "[1, 3]"),
        ('{"layer": 3, "ids": []}', "[tokens, 2]"),
        ('{"layer": 3, "ids": [[0, 8]]}', "0 to 7"),
        ('{"layer": 3, "ids": [[-1, 2]]}', "-1 to 2"),
        ('{"layer": 3, "ids": [[2, 2]]}', "twice"),
        ('{"layer": 3}', "KeyError('ids')"),
        ('{"layer": 3, "ids": [["a", 1]]}', "Error("),
        ("[3]", "Error("),
        ("routes", "line 1"),
        ('{"layer": 1e999, "ids": [[0, 1]]}', "OverflowError("),
        ('{"layer": 3, "ids": [[0, 1000000000000000000000]]}', "Error("),
    ],
)
def test_a_recording_that_does_not_fit(tmp_path: Path, content: str, name: str) -> None:
    file = tmp_path / "routes.jsonl"
    file.write_text(content)
    with raises(OptionError, str(file), name, option="routing"):
        routing_tables(parse_routing(f"recorded:{file}"), num_experts=8, top_k=2, layers=[3], rank=0, num_ranks=1)


def test_a_recording_that_is_missing(tmp_path: Path) -> None:
    spec = parse_routing(f"recorded:{tmp_path / 'none'}")
    with raises(OptionError, "FileNotFoundError", option="routing"):
        routing_tables(spec, num_experts=8, top_k=2, layers=[3], rank=0, num_ranks=1)


# ---- in a model


class Routed:
    """A tiny model routed by `text`; notes the routes of every layer by token."""

    def __init__(self, folder: Path, text: str, kind: str) -> None:
        tiny_config(kind, first_k_dense_replace=1).save_pretrained(folder)
        config = read_config(folder)
        transport = create_transport(
            "local",
            expert_shape(config, torch.float32),
            group=RankGroup(rank=0, size=1),
            streams=CpuStreams(),
            num_lanes=2,
        )
        self.model: Decoder = build_model(config, transport, parse_routing(text))
        fill_dummy_weights(self.model, seed=1)
        self.twin = Twin(None, self.model)  # type: ignore[arg-type]
        self.routes: dict[str, list[Routes]] = {}
        for name, module in self.model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda _, __, routes, name=name: self.routes[name].append(routes))
                self.routes[name] = []

    def run(self, requests: Sequence[RequestSlice], cuts: Sequence[int] = ()) -> tuple[torch.Tensor, dict[str, list]]:
        """Logits, and the experts of every token in the order of the batch, layer by layer."""
        for noted in self.routes.values():
            noted.clear()
        self.twin.empty_cache()
        logits = self.twin.our_logits(requests, cuts)
        ids = {name: torch.cat([routes.ids_TK for routes in noted]).tolist() for name, noted in self.routes.items()}
        return logits, ids


def two_requests() -> list[RequestSlice]:
    return [
        RequestSlice(request_id=number, token_ids=tuple(random_ids(12, seed=number)), context_len=0, block_ids=blocks)
        for number, blocks in enumerate(scattered_blocks(2, 12))
    ]


@pytest.mark.parametrize("kind", ["deepseek-v3", "qwen3-moe"])
@pytest.mark.parametrize("cut", [12, 5, 20])
def test_a_cut_does_not_change_the_routes(tmp_path: Path, kind: str, cut: int) -> None:
    routed = Routed(tmp_path, "uniform", kind)
    logits, ids = routed.run(two_requests())
    cut_logits, cut_ids = routed.run(two_requests(), [cut])
    assert len(ids) == (3 if kind == "qwen3-moe" else 2)
    assert cut_ids == ids
    torch.testing.assert_close(cut_logits, logits)
    layers = list(ids.values())
    assert all(layer == layers[0] for layer in layers)
    assert len({tuple(row) for row in layers[0]}) > 12  # neither do tokens at the same position share a row


def test_only_the_choice_is_replaced(tmp_path: Path) -> None:
    by_model, by_table = (Routed(tmp_path, text, "deepseek-v3") for text in ("model", "uniform"))
    model_logits, _ = by_model.run(two_requests())
    table_logits, _ = by_table.run(two_requests())
    assert not torch.allclose(model_logits, table_logits)
    (first, *_), (same, *_) = by_model.routes.values(), by_table.routes.values()
    assert torch.equal(first[0].weights_TK, same[0].weights_TK)
    assert not torch.equal(first[0].ids_TK, same[0].ids_TK)
    names = [dict(routed.model.checkpoint_tensors()).keys() for routed in (by_model, by_table)]
    assert names[0] == names[1]


def test_layers_share_one_table(tmp_path: Path) -> None:
    model = Routed(tmp_path, "zipf:1", "qwen3-moe").model
    tables = {id(module.table) for module in model.modules() if isinstance(module, TableRouter)}
    assert len(tables) == 1


def test_only_the_first_layer_of_a_step_looks_up_the_rows() -> None:
    """Even if the slots of the next step are in the same memory; and lanes have rows of their own."""
    table = RouteTable(torch.arange(20).view(10, 2))
    config = RoutingConfig(scores=Scoring.SOFTMAX, num_experts=20, top_k=2, normalize=True)
    first, second = (TableRouter(Router(4, config, dtype=torch.float32), table) for _ in range(2))
    for layer in (first, second):
        torch.nn.init.normal_(layer.router.weight)
    parts = [micro_batch(lane, slots) for lane, slots in enumerate(([3, 11], [7]))]
    x_TD = torch.randn(2, 4)

    def ids(layer: TableRouter, lane: int) -> torch.Tensor:
        with use_micro_batch(parts[lane]):
            return layer(x_TD[: parts[lane].num_tokens]).ids_TK

    of_lanes = [ids(first, lane) for lane in range(2)]
    assert [x.tolist() for x in of_lanes] == [[[6, 7], [2, 3]], [[14, 15]]]
    assert [ids(second, lane) is of_lanes[lane] for lane in range(2)] == [True, True]
    parts[0].attention.slots_T.fill_(5)
    assert ids(first, 0).tolist() == [[10, 11]] * 2
    assert ids(second, 0).tolist() == [[10, 11]] * 2
    parts[0] = micro_batch(0, [9])
    assert ids(second, 0).tolist() == [[18, 19]], "alone, without the first layer"


def micro_batch(lane: int, slots: list[int]) -> MicroBatch:
    return MicroBatch(
        lane=lane,
        requests=(),
        token_ids_T=torch.zeros(len(slots), dtype=torch.int64),
        positions_T=torch.zeros(len(slots), dtype=torch.int64),
        attention=AttentionMetadata(slots_T=torch.tensor(slots), decodes=None, prefills=()),
        rows_by_rank=(len(slots),),
    )


def test_the_kinds_are_those_of_the_option() -> None:
    assert [kind.value for kind in RoutingKind] == ["model", "uniform", "zipf", "recorded"]
