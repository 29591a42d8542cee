"""Stateless computation on tensors: each function is a plain-torch reference that runs on any device.

Where a fused kernel for CUDA devices exists, `dispatch.fused` runs it under the name of its reference.
"""
