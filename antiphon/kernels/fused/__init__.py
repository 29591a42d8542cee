"""Triton kernels and the functions that launch them: the fused twins of the plain-torch references one folder up.

They are imported only for tensors on a CUDA device (and by tests), because Triton is not installed everywhere. With
`TRITON_INTERPRET=1`, set before Triton is first imported, they run on the CPU, slowly.

Kernels are not specialized on sizes that change from step to step (`do_not_specialize`), so one compilation serves all
of them, and nothing is compiled in the middle of a run.
"""
