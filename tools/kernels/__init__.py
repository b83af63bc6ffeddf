"""Registers, spills, tiles and memory errors of the Triton kernels."""
