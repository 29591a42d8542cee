"""Every place at which a small batch can be cut gives the same logits, the same tokens and the same cache.

The cache is put back before every step: what a lane must have written is not there from the step before.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch

from antiphon.core.batch import RequestSlice
from tests.models.twin import Twin, random_checkpoint, random_ids, scattered_blocks

LIMIT = 1e-5
TEXT = 20

# For each request its context, and the end of its new tokens; contexts fill blocks of 4 tokens, or end inside of one.
BATCHES: dict[str, list[tuple[int, int]]] = {
    "mixed": [(11, 12), (6, 11), (8, 9), (0, 5), (4, 7)],
    "one-prompt": [(0, 11)],
    "one-chunk": [(7, 17)],
    "prompts-of-one-length": [(0, 4), (0, 4), (0, 4)],
    "decodes": [(3, 4), (4, 5), (12, 13), (19, 20), (1, 2)],
    "short": [(0, 1), (5, 7), (0, 2), (9, 10)],
}


@pytest.fixture(scope="module", params=["deepseek-v3", "qwen3-moe"])
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    folder = tmp_path_factory.mktemp(request.param)
    random_checkpoint(folder, kind=request.param)
    return Twin.load(None, folder)


class Cache:
    """What the contexts of a batch have left in the cache of every layer; all else is NaN."""

    def __init__(self, twin: Twin) -> None:
        self._blocks = [layer.self_attn.cache_blocks for layer in twin.ours.decoder_layers()]
        self._before = [blocks.clone() for blocks in self._blocks]

    def put_back(self) -> None:
        for blocks, before in zip(self._blocks, self._before, strict=True):
            blocks.copy_(before)

    def now(self) -> torch.Tensor:
        return torch.stack(self._blocks)


def make_batch(twin: Twin, spans: list[tuple[int, int]]) -> tuple[list[RequestSlice], Cache]:
    requests = []
    twin.empty_cache()
    for number, ((context, stop), blocks) in enumerate(zip(spans, scattered_blocks(len(spans), TEXT), strict=True)):
        ids = random_ids(TEXT, seed=number)
        if context:
            twin.our_logits([slice_of(number, ids[:context], 0, blocks)])
        requests.append(slice_of(number, ids[context:stop], context, blocks))
    return requests, Cache(twin)


def slice_of(number: int, ids: list[int], context: int, blocks: tuple[int, ...]) -> RequestSlice:
    return RequestSlice(request_id=number, token_ids=tuple(ids), context_len=context, block_ids=blocks)


def all_cuts(num_tokens: int) -> Iterator[tuple[int, ...]]:
    """One cut at every place, and two at all pairs of places."""
    for num_cuts in (1, 2):
        yield from combinations(range(1, num_tokens), num_cuts)


@pytest.mark.parametrize("name", BATCHES)
def test_every_cut_gives_the_same(twin: Twin, name: str) -> None:
    requests, cache = make_batch(twin, BATCHES[name])
    expected_TV, expected_cache = twin.our_logits(requests), cache.now()
    written = expected_cache.isfinite()
    num_tokens = expected_TV.shape[0]
    assert num_tokens == sum(stop - context for context, stop in BATCHES[name])
    assert expected_TV.isfinite().all()
    for cuts in all_cuts(num_tokens):
        cache.put_back()
        logits_TV = twin.our_logits(requests, cuts)
        error_T = (logits_TV - expected_TV).norm(dim=1) / expected_TV.norm(dim=1)
        assert error_T.max() < LIMIT, cuts
        assert torch.equal(logits_TV.argmax(1), expected_TV.argmax(1)), cuts
        now = cache.now()
        assert torch.equal(now.isfinite(), written), cuts
        torch.testing.assert_close(now[written], expected_cache[written], rtol=1e-4, atol=1e-5)


def test_a_lane_that_reads_before_it_was_written_is_seen(twin: Twin) -> None:
    """The check above would fail: without the first lane's keys and values the second one's logits are not numbers."""
    requests, cache = make_batch(twin, BATCHES["one-chunk"])
    twin.our_logits(requests)
    cache.put_back()
    request = requests[0]
    second_half = request.cut(5, request.query_len)
    assert not twin.our_logits([second_half]).isfinite().any()
