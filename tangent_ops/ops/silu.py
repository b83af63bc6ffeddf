"""SiLU (swish) for plain and dual tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tangent_ops.ops.activation_maps import activation_maps
from tangent_ops.ops.backend import Backend, why_not_in_float
from tangent_ops.ops.dual_op import DualOp, Maps, dual_outputs
from tangent_ops.ops.reference.silu import silu_jvp, silu_vjp


def silu(input: Tensor, inplace: bool = False, *, backend: Backend | None = None) -> Tensor:
    """``torch.nn.functional.silu`` with its tangent in the same pass.

        y = x σ(x)        y_t = σ(x) (1 + x (1 - σ(x))) x_t

    What is computed here and what is left to PyTorch's own function is in
    :mod:`tangent_ops.functional`.

    Args:
        input: any shape, plain or dual.
        inplace: overwrite ``input``; PyTorch's own function does that.
        backend: None chooses by device; "triton" or "reference" insists.

    Returns:
        As ``input``, dual if that is.

    Raises:
        UnsupportedError: ``backend="triton"`` and the kernels do not compute this call.
    """
    if inplace:
        return F.silu(input, inplace=True)
    found = dual_outputs(_OP, (input,), ("silu",), backend, why_not_in_float(input))
    return found[0] if found else F.silu(input)


def _jvp(primals, tangents, options):
    output, output_t = silu_jvp(primals[0], tangents[0])
    return (output,), (output_t,), ()


_OP = DualOp(
    function=lambda primals, options: (F.silu(primals[0]),),
    outputs=1,
    reference=Maps(
        jvp=_jvp,
        save=lambda primals, outputs, statistics: primals,
        vjp=lambda saved, grads, needs, options: (silu_vjp(saved[0], grads[0]),),
    ),
    triton=activation_maps(gated=False),
)
