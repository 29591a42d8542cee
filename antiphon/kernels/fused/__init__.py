"""Triton kernels, and the functions that launch them: twins of the plain-torch references one folder up.

Imported only for tensors on a CUDA device (and by tests), because Triton is not installed everywhere. With
`TRITON_INTERPRET=1`, set before Triton is first imported, they run on the CPU, slowly.
"""
