"""Eager torch formulas, one file per op: the CPU backend, and the oracle in float64.

Everything here is made of ordinary differentiable torch operations, so any nesting of autograd
and ``torch.func`` transforms goes through it.
"""
