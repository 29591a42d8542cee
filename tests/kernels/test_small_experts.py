"""The experts of few rows against their reference, on random inputs between poisoned neighbors."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton

from antiphon.kernels.fused import small_experts
from antiphon.kernels.fused.direct import Driver
from antiphon.kernels.fused.experts import compute_few, place_pairs
from antiphon.kernels.fused.persistent import PersistentLaunch, resident_programs
from antiphon.kernels.fused.small_experts import Tile, choose_tiles, place_few
from antiphon.kernels.grouped_experts import ExpertWorkspace, grouped_experts
from tests.kernels import tensors
from tests.kernels.tensors import DEVICE, NAN, padded, randn, relative_error

# The interpreter multiplies the bits of 16-bit numbers, not their values.
TOLERANCE = {torch.float32: 1e-5}
if DEVICE.type == "cuda":
    TOLERANCE |= {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}

make_ids = partial(tensors.make_ids, dtype=torch.int32)  # as the router chooses them

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, interpreting


def make_weights(num_experts: int, hidden: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = randn(num_experts, 2 * width, hidden, seed=5) / hidden**0.5
    down = randn(num_experts, hidden, width, seed=6) / width**0.5
    return gate_up.to(dtype), down.to(dtype)


# ---- places


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("max_ids", [16, 2048], ids=["many-blocks", "one-block"])
@pytest.mark.parametrize(
    ("num_rows", "top_k", "num_ids", "first", "num_experts"),
    [(70, 4, 11, 3, 5), (300, 1, 4, 0, 4), (1, 2, 8, 4, 4), (33, 8, 24, 8, 16), (40, 3, 9, 20, 6), (64, 2, 6, 5, 1)],
)
def test_places_are_those_of_the_kernels_for_many_rows(
    num_rows: int,
    top_k: int,
    num_ids: int,
    first: int,
    num_experts: int,
    max_ids: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With experts of others below and above, and padding; the last but one has none of its own."""
    monkeypatch.setattr(small_experts, "_MAX_IDS", max_ids)
    small_experts._place.cache_clear()
    ids_RK = padded(make_ids(num_rows, top_k, num_ids, seed=1, dtype=dtype), 3, filling=first)
    ids_RK[1::3] = -1
    try:
        places_RK, rows_X, ends_E = place_few(ids_RK, num_experts, ExpertWorkspace(), first_expert=first)
    finally:
        small_experts._place.cache_clear()
    expected_RK, expected_E = place_pairs(ids_RK, num_experts, ExpertWorkspace(), first_expert=first)
    assert torch.equal(places_RK, expected_RK)
    assert torch.equal(ends_E, expected_E)
    rows_RK = torch.arange(num_rows, device=DEVICE).unsqueeze(1).expand(num_rows, top_k)
    here = places_RK >= 0
    assert torch.equal(rows_X[places_RK[here].long()].long(), rows_RK[here])


# ---- experts

SIXTEEN_BITS = [choose_tiles(pairs, torch.bfloat16, large_shared=True) for pairs in (1, 30, 60, 200)]


def run(
    x_RD: torch.Tensor,
    ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    first: int = 0,
    workspace: ExpertWorkspace | None = None,
) -> torch.Tensor:
    """Into rows that lie 8 numbers apart, which must stay as they were."""
    num_rows, hidden = x_RD.shape
    out_RD = padded(torch.full((num_rows, hidden), NAN, dtype=x_RD.dtype, device=DEVICE), 8, filling=77.0)
    workspace = workspace or ExpertWorkspace()
    compute_few(x_RD, ids_RK, weights_RK, gate_up, down, out_RD, first_expert=first, workspace=workspace)
    assert (out_RD.as_strided((num_rows, 8), out_RD.stride(), hidden) == 77.0).all()
    return out_RD


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "top_k", "num_ids", "first", "hidden", "width"),
    [
        (40, 3, 9, 2, 32, 16),
        (21, 6, 6, 0, 24, 40),
        (6, 2, 5, 5, 16, 8),
        (1, 1, 5, 1, 19, 13),
        (32, 4, 10, 5, 160, 72),
        (300, 2, 8, 3, 40, 33),
        pytest.param(512, 2, 10, 5, 32, 32, marks=pytest.mark.slow),
    ],
    ids=["some-elsewhere", "mostly-here", "none-here", "one-row", "32-rows", "300-rows", "512-rows"],
)
def test_experts(
    num_rows: int, top_k: int, num_ids: int, first: int, hidden: int, width: int, dtype: torch.dtype
) -> None:
    """Twice with one workspace, so that what the first call left behind is under the second."""
    gate_up, down = make_weights(5, hidden, width, dtype)
    workspace = ExpertWorkspace()
    for seed in (10, 20):
        x_RD = padded(randn(num_rows, hidden, seed=seed, dtype=dtype), 8)
        ids_RK = padded(make_ids(num_rows, top_k, num_ids, seed=seed + 1), 2, filling=first)
        weights_RK = padded(randn(num_rows, top_k, seed=seed + 2), 2)
        out_RD = run(x_RD, ids_RK, weights_RK, gate_up, down, first=first, workspace=workspace)
        expected = grouped_experts.reference(x_RD, ids_RK, weights_RK, gate_up, down, first_expert=first)
        assert relative_error(out_RD, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("hidden", "width"), [(256, 128), (200, 90), (7, 5)])
@pytest.mark.parametrize("tiles", SIXTEEN_BITS, ids=str)
def test_tiles_of_16_bits(tiles: tuple[Tile, Tile], hidden: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32; widths that are multiples of all tiles, of none, and smaller than any."""
    monkeypatch.setattr(small_experts, "choose_tiles", lambda pairs, dtype, *, large_shared: tiles)
    gate_up, down = make_weights(3, hidden, width, torch.float32)
    x_RD, weights_RK = randn(90, hidden, seed=10), randn(90, 2, seed=12)
    ids_RK = make_ids(90, 2, 4, seed=11)
    if DEVICE.type == "cuda":  # what float32 takes does not fit in these tiles
        x_RD, gate_up, down = (x.to(torch.bfloat16) for x in (x_RD, gate_up, down))
    out_RD = run(x_RD, ids_RK, weights_RK, gate_up, down)
    expected = grouped_experts.reference(x_RD.float(), ids_RK, weights_RK, gate_up.float(), down.float())
    assert relative_error(out_RD, expected) < TOLERANCE[x_RD.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_padding_is_not_read_and_its_sums_are_zero(dtype: torch.dtype) -> None:
    """Undefined rows and infinite weights, at a hot expert whose tiles they would be in."""
    gate_up, down = make_weights(4, 48, 32, dtype)
    x_RD, weights_RK = randn(60, 48, seed=1, dtype=dtype), randn(60, 2, seed=2)
    ids_RK = torch.tensor([[2, 9]], dtype=torch.int32, device=DEVICE).repeat(60, 1)
    ids_RK[::2] = -1
    x_RD[::2], weights_RK[::2] = NAN, float("inf")
    weights_RK[:, 1] = NAN
    out_RD = run(x_RD, ids_RK, weights_RK, gate_up, down)
    assert (out_RD[::2] == 0).all()
    expected = grouped_experts.reference(x_RD[1::2], ids_RK[1::2, :1], weights_RK[1::2, :1], gate_up, down)
    assert relative_error(out_RD[1::2], expected) < TOLERANCE[dtype]
    ids_RK.fill_(-1)
    assert (run(x_RD, ids_RK, weights_RK, gate_up, down) == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    """In other tiles, at other places in them, and next to other rows."""
    gate_up, down = make_weights(4, 96, 80, dtype)
    x_RD, weights_RK = randn(200, 96, seed=3, dtype=dtype), randn(200, 2, seed=4)
    ids_RK = make_ids(200, 2, 5, seed=5)
    together = run(x_RD, ids_RK, weights_RK, gate_up, down)
    for rows in (slice(0, 1), slice(77, 78), slice(150, 200)):
        alone = run(x_RD[rows], ids_RK[rows], weights_RK[rows], gate_up, down)
        assert alone.abs().sum() > 0
        assert torch.equal(alone, together[rows])


def test_sums_are_wider_than_products() -> None:
    """Two experts that cancel but for a weight that 16 bits could not tell."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    gate_up, down = make_weights(1, 16, 16, dtype)
    gate_up, down = gate_up.repeat(2, 1, 1), torch.cat([down, -down])
    x_RD = randn(8, 16, seed=7, dtype=dtype)
    ids_RK = torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE).repeat(8, 1)
    weights_RK = torch.tensor([[1.0, 1.0 - 2.0**-12]], device=DEVICE).repeat(8, 1)
    out_RD = run(x_RD, ids_RK, weights_RK, gate_up, down)
    single_RD = run(x_RD, ids_RK[:, :1], weights_RK[:, :1], gate_up, down)
    torch.testing.assert_close(out_RD.float(), single_RD.float() * 2.0**-12, rtol=2e-2, atol=1e-8)


def test_only_the_width_of_tiles_depends_on_the_number_of_rows() -> None:
    """So that the bits do not."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for large_shared in (True, False):
            chosen = [choose_tiles(pairs, dtype, large_shared=large_shared) for pairs in (0.1, 16, 17, 40, 500)]
            assert len({(t.BLOCK_M, t.BLOCK_K, t.STAGES) for t, _ in chosen}) == 1
            assert len({(t.BLOCK_M, t.BLOCK_K, t.STAGES) for _, t in chosen}) == 1
            widths = [[pair[i].BLOCK_N for pair in chosen] for i in (0, 1)]
            assert all(width == sorted(width) for width in widths)


H100 = SimpleNamespace(
    multi_processor_count=132,
    shared_memory_per_multiprocessor=228 << 10,
    regs_per_multiprocessor=1 << 16,
    max_threads_per_multi_processor=2048,
)


def test_resident_programs() -> None:
    """By shared memory, by registers, by threads; and one at least."""
    assert resident_programs(80, 110_592, 4, H100) == 2
    assert resident_programs(113, 20_000, 4, H100) == 4  # 120 registers of 128 threads
    assert resident_programs(16, 0, 4, H100) == 16
    assert resident_programs(255, 300_000, 8, H100) == 1


def test_a_persistent_launch_fills_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks the compiler once, before its first launch."""
    events: list[object] = []

    class FakeKernel:
        def warmup(self, *args: object, grid: tuple[int, ...], **kwargs: object) -> SimpleNamespace:
            events.append(("compiled", args, kwargs))
            return SimpleNamespace(run=None, n_regs=80, metadata=SimpleNamespace(shared=110_592))

        def __getitem__(self, grid: tuple[int, int]):  # type: ignore[no-untyped-def]
            return lambda *args, **kwargs: events.append(("launched", grid))

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    always_hooked = Driver(device=lambda: 0, stream=lambda device: 0, hooked=lambda: True, direct=lambda compiled: None)
    launch = PersistentLaunch(FakeKernel(), integers=(3,), constants={"D": 8}, driver=always_hooked)
    x = torch.zeros(4)
    launch(x)
    launch(x)
    assert events == [
        ("compiled", (x, 3), {"D": 8, "num_warps": 4}),
        ("launched", (264, 1)),
        ("launched", (264, 1)),
    ]
