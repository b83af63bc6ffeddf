"""Attention: the fused primal-and-tangent forward pass and its tangent-only backward pass."""

from tangent_kernels.attention.backward import attention_vjp
from tangent_kernels.attention.forward import attention_jvp

__all__ = ["attention_jvp", "attention_vjp"]
