"""Attention: the fused primal-and-tangent forward pass and its backward passes."""

from tangent_kernels.attention._call import Call, Tangents
from tangent_kernels.attention.forward import attention_jvp, run_jvp
from tangent_kernels.attention.gradients import (
    Gradients,
    attention_second_vjp,
    attention_vjp,
    run_second_vjp,
    run_vjp,
)

__all__ = [
    "Call",
    "Gradients",
    "Tangents",
    "attention_jvp",
    "attention_second_vjp",
    "attention_vjp",
    "run_jvp",
    "run_second_vjp",
    "run_vjp",
]
