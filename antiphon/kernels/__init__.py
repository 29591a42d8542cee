"""Computation on tensors, without state: each function is a plain-torch reference that any device can run.

Kernels written for a device stand beside the reference that they are tested against.
"""
