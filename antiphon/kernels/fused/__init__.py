"""Triton kernels and the functions that launch them: the twins of the plain-torch references one folder up.

Imported only for tensors on a CUDA device (and by tests), because Triton is not installed everywhere. With
`TRITON_INTERPRET=1`, set before Triton is first imported, they run on the CPU, slowly.

Sizes that change from step to step are not specialized (`do_not_specialize`): one compilation serves all of them, and
nothing is compiled in the middle of a run.
"""
