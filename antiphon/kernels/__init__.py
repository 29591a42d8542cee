"""Computation on tensors, without state: each function is a plain-torch reference that any device can run.

Where there is a fused kernel for CUDA devices, `dispatch.fused` finds it behind the name of its reference.
"""
