"""SiLU (swish) for plain and dual tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tangent_ops.ops.activation_maps import ACTIVATION_MAPS
from tangent_ops.ops.backend import Backend, why_not_in_float
from tangent_ops.ops.dual_op import DualOp, Maps, dual_output
from tangent_ops.ops.reference.silu import silu_jvp, silu_vjp


def silu(input: Tensor, inplace: bool = False, *, backend: Backend | None = None) -> Tensor:
    """``torch.nn.functional.silu`` with its tangent in the same pass.

        y = x σ(x)        y_t = σ(x) (1 + x (1 - σ(x))) x_t

    :mod:`tangent_ops.functional` says which calls are computed here and which by PyTorch's own
    function.

    Args:
        input: any shape, plain or dual.
        inplace: overwrite ``input``; PyTorch's own function computes such a call.
        backend: None chooses by device; "triton" or "reference" insists.

    Returns:
        As ``input``, dual if that is.

    Raises:
        UnsupportedError: ``backend="triton"`` and the kernels do not compute this call.
    """
    if inplace:
        return F.silu(input, inplace=True)
    found = dual_output(_OP, (input,), ("silu",), backend, why_not_in_float(input))
    return F.silu(input) if found is None else found


def _jvp(primals, tangents, options):
    return *silu_jvp(primals[0], tangents[0]), ()


_OP = DualOp(
    function=lambda primals, options: F.silu(primals[0]),
    reference=Maps(
        jvp=_jvp,
        save=lambda primals, output, statistics: primals,
        vjp=lambda saved, grad, needs, options: (silu_vjp(saved[0], grad),),
    ),
    triton=ACTIVATION_MAPS,
)
