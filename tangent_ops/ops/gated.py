"""GEGLU and SwiGLU for plain and dual tensors."""

# Operands come in tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tangent_ops.errors import ArgumentError
from tangent_ops.ops.activation_maps import activation_maps
from tangent_ops.ops.backend import Backend, why_not_in_float
from tangent_ops.ops.dual_op import DualOp, Maps, dual_outputs
from tangent_ops.ops.reference.gated import gated_jvp, gated_vjp


def geglu(
    gate: Tensor, value: Tensor, approximate: str = "none", *, backend: Backend | None = None
) -> Tensor:
    """``F.gelu(gate) * value`` with its tangent, in one pass (Shazeer, arXiv:2002.05202).

        y = f(x) v        y_t = f'(x) x_t v + f(x) v_t

    Neither f(x) nor a tangent is kept for the backward pass where gate and value are frozen. What
    is computed here and what is left to PyTorch is in :mod:`tangent_ops.functional`.

    Args:
        gate: x, any shape, plain or dual; halves of one tensor (``chunk``) are read in place.
        value: v, same shape and dtype, plain or dual.
        approximate: of GELU: "none" or "tanh".
        backend: None chooses by device; "triton" or "reference" insists.

    Returns:
        As ``gate``, dual if an operand is.

    Raises:
        ArgumentError: shapes or dtypes differ, or there is no such approximation.
        UnsupportedError: ``backend="triton"`` and the kernels do not compute this call.
    """
    if approximate not in ("none", "tanh"):
        raise ArgumentError(f"approximate={approximate!r}: expected 'none' or 'tanh'")
    return _gated(gate, value, "gelu_tanh" if approximate == "tanh" else "gelu", backend)


def swiglu(gate: Tensor, value: Tensor, *, backend: Backend | None = None) -> Tensor:
    """``F.silu(gate) * value`` with its tangent, in one pass; see :func:`geglu`."""
    return _gated(gate, value, "silu", backend)


def _gated(gate: Tensor, value: Tensor, name: str, backend: Backend | None) -> Tensor:
    if gate.shape != value.shape or gate.dtype != value.dtype:
        raise ArgumentError(
            f"gate is {tuple(gate.shape)}, {gate.dtype}, but value {tuple(value.shape)}, "
            f"{value.dtype}: expected the same of both"
        )
    why_not = why_not_in_float(gate)
    found = dual_outputs(_OP, (gate, value), (name,), backend, why_not)
    return found[0] if found else _function((gate, value), (name,))[0]


def _function(primals, options) -> tuple[Tensor, ...]:
    gate, value = primals
    if options[0] == "silu":
        return (F.silu(gate) * value,)
    approximate = "tanh" if options[0] == "gelu_tanh" else "none"
    return (F.gelu(gate, approximate=approximate) * value,)


def _jvp(primals, tangents, options):
    output, output_t = gated_jvp(*primals, *tangents, *options)
    return (output,), (output_t,), ()


_OP = DualOp(
    function=_function,
    outputs=1,
    reference=Maps(
        jvp=_jvp,
        save=lambda primals, outputs, statistics: primals,
        vjp=lambda saved, grads, needs, options: gated_vjp(*saved, grads[0], needs, *options),
    ),
    triton=activation_maps(gated=True),
)
