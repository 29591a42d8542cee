"""Transports over collectives: `allgather`, `alltoall` (gloo and NCCL) and the baseline `nccl-zero-cta`."""
