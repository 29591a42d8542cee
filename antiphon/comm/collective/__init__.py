"""Transports over collectives: `allgather` and `alltoall` over gloo or NCCL, and the baseline `nccl-zero-cta`."""
