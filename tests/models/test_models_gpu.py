"""All architectures on a CUDA device in float32 against `transformers` on the CPU, by the kernels of the device."""

from __future__ import annotations

import pytest
import torch

from antiphon.models.checkpoint.block_fp8 import BlockFp8
from tests.models.quantize import quantized
from tests.models.test_parity import CASES, NUM_TOKENS, TOLERANCE, part_of
from tests.models.twin import Twin, random_checkpoint, random_ids, relative_error, scattered_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=CASES)
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    folder = tmp_path_factory.mktemp("checkpoint")
    kind, changes = CASES[request.param]
    return Twin.load(random_checkpoint(folder, kind=kind, **changes), folder, device="cuda")


@pytest.mark.parametrize("cuts", [(), (15,), (10, 20)], ids=str)
def test_prefill_and_decode(twin: Twin, cuts: tuple[int, ...]) -> None:
    twin.empty_cache()
    ids = random_ids(NUM_TOKENS, seed=8)
    (blocks,) = scattered_blocks(1, NUM_TOKENS)
    expected = twin.their_logits(ids)
    first = NUM_TOKENS - 4
    assert relative_error(twin.our_logits([part_of(ids, 0, first, blocks)], cuts), expected[:first]) < TOLERANCE
    for position in range(first, NUM_TOKENS):
        logits = twin.our_logits([part_of(ids, position, position + 1, blocks)])
        assert relative_error(logits[0], expected[position]) < TOLERANCE, position


def test_prompts_of_the_same_length_beside_a_chunk(twin: Twin) -> None:
    twin.empty_cache()
    texts = [random_ids(NUM_TOKENS, seed=seed) for seed in range(3)]
    blocks = list(scattered_blocks(3, NUM_TOKENS))
    twin.our_logits([part_of(texts[2], 0, 6, blocks[2])])
    requests = [
        part_of(texts[0], 0, 9, blocks[0]),
        part_of(texts[1], 0, 9, blocks[1], 1),
        part_of(texts[2], 6, 14, blocks[2], 2),
    ]
    expected = torch.cat([twin.their_logits(texts[0][:9]), twin.their_logits(texts[1][:9])])
    expected = torch.cat([expected, twin.their_logits(texts[2][:14])[6:]])
    assert relative_error(twin.our_logits(requests, (13,)), expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_fp8_is_multiplied_out_on_the_device(dtype: torch.dtype) -> None:
    stored_OI, scale_BC, plain_OI = quantized(torch.randn(300, 700), 128, 128)
    merged_OI = torch.full((512, 700), float("nan"), dtype=dtype, device="cuda")
    BlockFp8(rows=128, columns=128).dequantize(stored_OI.cuda(), scale_BC.cuda(), merged_OI[100:400])
    assert torch.equal(merged_OI[100:400].cpu(), plain_OI.to(dtype))
    assert merged_OI[:100].isnan().all()
    assert merged_OI[400:].isnan().all()
