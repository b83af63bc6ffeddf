"""Eager torch formulas, one file per op: the CPU backend, and the oracle in float64.

``attention`` is made of ordinary differentiable torch operations, so any nesting of autograd and
``torch.func`` transforms goes through it. The other files pair a tangent (``*_jvp``) with its
adjoint (``*_vjp``), and write in place: for a plain dual level, where nothing else is asked for.
"""
