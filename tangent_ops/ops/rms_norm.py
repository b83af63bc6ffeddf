"""RMS normalization for plain and dual tensors."""

# Operands come in tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tangent_ops.ops.backend import Backend, why_not_in_rows
from tangent_ops.ops.dual_op import DualOp, Maps, dual_outputs
from tangent_ops.ops.layer_norm import is_left_to_pytorch, shapes_fit
from tangent_ops.ops.norm_maps import norm_maps
from tangent_ops.ops.reference.rms_norm import rms_norm_jvp, rms_norm_vjp


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """``torch.nn.functional.rms_norm`` with its tangent (Zhang, Sennrich, arXiv:1910.07467).

        y = w∘x̂        y_t = w∘(J x_t) + w_t∘x̂        x̂ = x / √(mean(x²) + ε)

    Where x and w are frozen no tangent is kept for the backward pass. Under autocast, with mixed
    dtypes, over several dimensions at once on a CPU, and where :mod:`tangent_ops.functional` says
    so, it is PyTorch's own function.

    Args:
        input: (..., *normalized_shape), plain or dual.
        normalized_shape: the trailing dimensions that are normalized together.
        weight: normalized_shape, plain or dual, or None for ones.
        eps: added under the root; None for the dtype's own.
        backend: None chooses by device; "triton" or "reference" insists.

    Returns:
        As ``input``, dual if an input is.

    Raises:
        UnsupportedError: ``backend="triton"`` and the kernels do not compute this call.
    """
    shape = tuple(normalized_shape)
    found = None
    if shapes_fit(input, shape, weight) and not is_left_to_pytorch(input, weight):
        # PyTorch computes 16-bit operands in float32, whose eps it takes then.
        wide = torch.promote_types(input.dtype, torch.float32)
        added = torch.finfo(wide).eps if eps is None else eps
        why_not = why_not_in_rows(input, math.prod(shape))
        op = _OP if len(shape) == 1 else _OF_SEVERAL
        found = dual_outputs(op, (input, weight), (shape, added), backend, why_not)
    return found[0] if found else F.rms_norm(input, list(shape), weight, eps)


def _function(primals, options):
    shape, eps = options
    return (F.rms_norm(primals[0], shape, primals[1], eps),)


def _jvp(primals, tangents, options):
    output, output_t, rstd = rms_norm_jvp(*primals, options[1], *tangents)
    return (output,), (output_t,), (rstd,)


def _save(primals, outputs, statistics):
    return *primals, *statistics


_OP = DualOp(
    function=_function,
    outputs=1,
    reference=Maps(
        jvp=_jvp,
        save=_save,
        vjp=lambda saved, grads, needs, options: rms_norm_vjp(grads[0], *saved, needs),
    ),
    triton=norm_maps(_save, centered=False),
)
_OF_SEVERAL = DualOp(_function, 1, reference=None, triton=norm_maps(_save, centered=False))
