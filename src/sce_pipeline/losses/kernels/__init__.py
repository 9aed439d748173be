"""The losses' Triton kernels, for CUDA; the only room that imports Triton.

Each module holds kernels and the functions that launch them; the losses import it when they launch.
With ``TRITON_INTERPRET=1`` in the environment the kernels run on a CPU, slowly, to be tested there.
"""
