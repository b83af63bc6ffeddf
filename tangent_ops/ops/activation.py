"""GELU and SiLU for plain and dual tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tangent_ops.ops.backend import Backend, why_not_in_float
from tangent_ops.ops.dual_op import DualOp, Maps, dual_output
from tangent_ops.ops.reference.activation import gelu_jvp, gelu_vjp, silu_jvp, silu_vjp

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
_NAMES = {approximate: name for name, approximate in APPROXIMATE.items()}


def gelu(input: Tensor, approximate: str = "none", *, backend: Backend | None = None) -> Tensor:
    """``torch.nn.functional.gelu`` with its tangent in the same pass.

        y = x Φ(x)        y_t = (Φ(x) + x φ(x)) x_t

    If x is frozen, no tangent is saved for the backward pass; PyTorch's own rule saves x_t and x,
    for derivatives by x. :mod:`tangent_ops.functional` says which calls are computed here and
    which by PyTorch's own function.

    Args:
        input: any shape, plain or dual.
        approximate: "none" or "tanh".
        backend: "triton", "reference", or None to choose by device.

    Returns:
        As ``input``; dual if ``input`` is dual.

    Raises:
        UnsupportedError: ``backend="triton"`` and the kernels do not compute this call.
    """
    name = _NAMES.get(approximate)
    found = None
    if name is not None:
        found = dual_output(_GELU, (input,), (name,), backend, why_not_in_float(input))
    return F.gelu(input, approximate=approximate) if found is None else found


def silu(input: Tensor, inplace: bool = False, *, backend: Backend | None = None) -> Tensor:
    """``torch.nn.functional.silu`` with its tangent in the same pass.

        y = x σ(x)        y_t = σ(x) (1 + x (1 - σ(x))) x_t

    :mod:`tangent_ops.functional` says which calls are computed here and which by PyTorch's own
    function.

    Args:
        input: any shape, plain or dual.
        inplace: overwrite ``input``; PyTorch's own function computes such a call.
        backend: "triton", "reference", or None to choose by device.

    Returns:
        As ``input``; dual if ``input`` is dual.

    Raises:
        UnsupportedError: ``backend="triton"`` and the kernels do not compute this call.
    """
    if inplace:
        return F.silu(input, inplace=True)
    found = dual_output(_SILU, (input,), ("silu",), backend, why_not_in_float(input))
    return F.silu(input) if found is None else found


# --- the same maps by the kernels; options are (name,), one of the kernels' ACTIVATIONS ---


def _fused_jvp(primals, tangents, options):
    from tangent_kernels import activation

    return *activation.activation_jvp(primals[0], tangents[0], *options), ()


def _fused_vjp(saved, grad, needs, options):
    from tangent_kernels import activation

    return (activation.activation_vjp(saved[0], grad, *options),)


def _fused_second_vjp(primals, tangents, saved, grad, grad_t, needs, needs_t, options):
    from tangent_kernels import activation

    both, wanted = (grad, grad_t), (*needs, *needs_t)
    x, x_t = activation.activation_second_vjp(primals[0], tangents[0], both, wanted, *options)
    return (x,), (x_t,)


def _save(primals, output, statistics):
    return primals


_FUSED = Maps(_fused_jvp, _save, _fused_vjp, _fused_second_vjp)
_GELU = DualOp(
    function=lambda primals, options: F.gelu(primals[0], approximate=APPROXIMATE[options[0]]),
    reference=Maps(
        jvp=lambda primals, tangents, options: (
            *gelu_jvp(primals[0], tangents[0], APPROXIMATE[options[0]]),
            (),
        ),
        save=_save,
        vjp=lambda saved, grad, needs, options: (
            gelu_vjp(saved[0], grad, APPROXIMATE[options[0]]),
        ),
    ),
    triton=_FUSED,
)
_SILU = DualOp(
    function=lambda primals, options: F.silu(primals[0]),
    reference=Maps(
        jvp=lambda primals, tangents, options: (*silu_jvp(primals[0], tangents[0]), ()),
        save=_save,
        vjp=lambda saved, grad, needs, options: (silu_vjp(saved[0], grad),),
    ),
    triton=_FUSED,
)
