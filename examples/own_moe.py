"""Your own MoE layer, overlapped with the library alone: torchrun --nproc-per-node 2 examples/own_moe.py"""

import os
import sys

import torch
import torch.nn.functional as F

from antiphon.comm import ExpertShape, RankGroup, Routes, create_transport
from antiphon.runtime import activate, device_for_rank, finish, num_devices, run_lanes, streams_for

T, D, E, K = 256, 64, 8, 2  # tokens, hidden size, experts, experts per token

if "RANK" not in os.environ:
    sys.exit("own_moe.py must be started by torchrun: torchrun --nproc-per-node 2 examples/own_moe.py")
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
device = device_for_rank("cuda" if num_devices("cuda") >= local_size else "cpu", local_rank)
activate(device)  # makes it torch's current device, and turns TF32 off
torch.set_grad_enabled(False)  # transports are forward only
group = RankGroup.connect(rank=rank, size=size, init_method="env://")
streams = streams_for(device)
shape = ExpertShape(num_experts=E, top_k=K, hidden_size=D, dtype=torch.float32)
name = "auto" if local_size == size else "alltoall"  # auto chooses among transports for one host
transport = create_transport(name, shape, group=group, streams=streams, num_lanes=2, max_tokens=T)

weights = torch.Generator().manual_seed(0)  # the same on every rank
router, experts = torch.randn(D, E, generator=weights), torch.randn(E, D, D, generator=weights) / D**0.5
router, mine = router.to(device), experts[rank * E // size : (rank + 1) * E // size].to(device)


def moe_layer(x: torch.Tensor) -> torch.Tensor:
    probs, ids = (x @ router).softmax(-1).topk(K)
    sent = transport.dispatch(x, Routes(ids, probs), tokens_by_rank=(len(x),) * size)
    rows = finish(sent)  # the other lane computes here
    out = torch.zeros_like(rows.x_RD) if rows.out_RD is None else rows.out_RD.zero_()
    for expert, matrix in enumerate(mine):  # computes all rows in each expert: slow, but the host never waits for a GPU
        weight = (rows.weights_RK * (rows.ids_RK == expert)).sum(1, keepdim=True)
        out += F.silu(rows.x_RD @ matrix) * weight
    return finish(transport.combine(out))  # and here


x = torch.randn(T, D, generator=torch.Generator().manual_seed(rank + 1)).to(device)
(whole,) = run_lanes([lambda: moe_layer(x)], streams=streams)
halves = run_lanes([lambda: moe_layer(x[: T // 2]), lambda: moe_layer(x[T // 2 :])], streams=streams)
torch.testing.assert_close(torch.cat(halves), whole)
print(f"rank {rank} on {device} over {transport.name}: two lanes give what one lane gives")
group.close()
