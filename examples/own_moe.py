"""Your own MoE layer, overlapped with the library alone: torchrun --nproc-per-node 2 examples/own_moe.py"""

import os

import torch
import torch.nn.functional as F

from antiphon.comm import ExpertShape, RankGroup, Routes, create_transport
from antiphon.runtime import CpuStreams, finish, run_lanes

T, D, E, K = 256, 64, 8, 2  # tokens, hidden size, experts, experts per token

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
group = RankGroup.connect(rank=rank, size=size, init_method="env://")
shape = ExpertShape(num_experts=E, top_k=K, hidden_size=D, dtype=torch.float32)
transport = create_transport("alltoall", shape, group=group, streams=CpuStreams(), num_lanes=2)

torch.manual_seed(0)
router, experts = torch.randn(D, E), torch.randn(E, D, D) / D**0.5
mine = experts[rank * E // size : (rank + 1) * E // size]  # rank r holds experts r*E/W to (r+1)*E/W


def moe_layer(x: torch.Tensor) -> torch.Tensor:
    weights, ids = (x @ router).softmax(-1).topk(K)
    rows = finish(transport.dispatch(x, Routes(ids, weights)))  # the other lane computes here
    out = torch.zeros_like(rows.x_RD)
    for expert, matrix in enumerate(mine):
        row, place = (rows.ids_RK == expert).nonzero(as_tuple=True)
        out.index_add_(0, row, F.silu(rows.x_RD[row] @ matrix) * rows.weights_RK[row, place, None])
    return finish(transport.combine(out))  # and here


x = torch.randn(T, D, generator=torch.Generator().manual_seed(rank))
(whole,) = run_lanes([lambda: moe_layer(x)])
halves = run_lanes([lambda: moe_layer(x[: T // 2]), lambda: moe_layer(x[T // 2 :])])
torch.testing.assert_close(torch.cat(halves), whole)
print(f"rank {rank}: two lanes give what one lane gives")
group.close()
