"""Eager torch formulas, one file per op: the CPU backend, and the oracle in float64.

``attention`` uses ordinary differentiable torch operations, so every nesting of autograd and
``torch.func`` transforms works. The other files pair a tangent (``*_jvp``) with its adjoint
(``*_vjp``), and write in place, for a plain dual level.
"""
