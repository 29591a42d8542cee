"""Pure functions that cut batches and join the parts: `find_cut`, `split` and `join`.

request_boundary([127, 129], num_tokens=256)   # -> (127, 1): after the first request
token_slices([8, 8], cuts=[12])                # the second request straddles the cut and is in both parts
"""

from antiphon.splitting.cut_points import Cut, find_cut, request_boundary
from antiphon.splitting.micro_batches import build_micro_batch, join, split
from antiphon.splitting.slices import MicroSlice, token_slices
from antiphon.splitting.tensors import cut_tensors, join_tensors

__all__ = [
    "Cut",
    "MicroSlice",
    "build_micro_batch",
    "cut_tensors",
    "find_cut",
    "join",
    "join_tensors",
    "request_boundary",
    "split",
    "token_slices",
]
