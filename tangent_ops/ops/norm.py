"""Layer and RMS normalization for plain and dual tensors."""

# Operands come in tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tangent_ops.ops.backend import Backend, autocast_is_on, why_not_in_rows
from tangent_ops.ops.composed import with_value_of
from tangent_ops.ops.dual_op import DualOp, Maps, dual_output
from tangent_ops.ops.norm_maps import norm_maps
from tangent_ops.ops.pytorch_rules import may_be_differentiated
from tangent_ops.ops.reference import layer_norm as reference
from tangent_ops.ops.reference import rms_norm as rms_reference
from tangent_ops.ops.reference.layer_norm import layer_norm_jvp, layer_norm_vjp
from tangent_ops.ops.reference.rms_norm import rms_norm_jvp, rms_norm_vjp


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """``torch.nn.functional.layer_norm`` with its tangent: one pass on CUDA, three elsewhere.

        y = w∘x̂ + b        y_t = w∘(J x_t) + w_t∘x̂ + b_t        J = ∂x̂/∂x

    If x, w and b are frozen, the gradients of the tangents are the ordinary ones and no tangent is
    saved. PyTorch's own function computes calls under autocast, with mixed dtypes, and where
    :mod:`tangent_ops.functional` says so. Plain operations compute calls where derivatives of the
    tangent by x, or by b without w, may be needed: PyTorch's rules are silently wrong there.

    Args:
        input: (..., *normalized_shape), plain or dual.
        normalized_shape: the trailing dimensions that are normalized together.
        weight: normalized_shape, plain or dual, or None for ones.
        bias: normalized_shape, plain or dual, or None for zeros.
        eps: added to the variance.
        backend: "triton", "reference", or None to choose by device.

    Returns:
        As ``input``; dual if an input is dual.

    Raises:
        UnsupportedError: ``backend="triton"`` and the kernels do not compute this call.
    """
    shape = tuple(normalized_shape)
    if not shapes_fit(input, shape, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # raises PyTorch's error
    found = None
    if not is_left_to_pytorch(input, weight, bias):
        # PyTorch's backward pass with a bias alone cannot be differentiated again.
        bias_alone = weight is None and bias is not None
        op = _LAYER_OF_BIAS_ALONE if bias_alone else _LAYER
        why_not = why_not_in_rows(input, math.prod(shape))
        found = dual_output(op, (input, weight, bias), (shape, eps), backend, why_not)
    if found is not None:
        return found
    if _needs_formula(input, weight, bias):
        # Also for Dynamo, which cannot trace PyTorch's function of a dual input and plain weights.
        return reference.layer_norm(input, shape, weight, bias, eps)
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


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

    If x and w are frozen, no tangent is saved for the backward pass. PyTorch's own function
    computes calls under autocast, with mixed dtypes, over several dimensions on a CPU, and where
    :mod:`tangent_ops.functional` says so. Plain operations compute calls where derivatives of the
    tangent by x or w may be needed: on CUDA PyTorch's own backward pass has no forward mode.

    Args:
        input: (..., *normalized_shape), plain or dual.
        normalized_shape: the trailing dimensions that are normalized together.
        weight: normalized_shape, plain or dual, or None for ones.
        eps: added under the root; None for the dtype's epsilon.
        backend: "triton", "reference", or None to choose by device.

    Returns:
        As ``input``; dual if an input is dual.

    Raises:
        UnsupportedError: ``backend="triton"`` and the kernels do not compute this call.
    """
    shape = tuple(normalized_shape)
    if not shapes_fit(input, shape, weight) or is_left_to_pytorch(input, weight):
        return F.rms_norm(input, list(shape), weight, eps)
    # PyTorch computes 16-bit operands in float32 and uses the eps of float32.
    wide = torch.promote_types(input.dtype, torch.float32)
    added = torch.finfo(wide).eps if eps is None else eps
    why_not = why_not_in_rows(input, math.prod(shape))
    op = _RMS if len(shape) == 1 else _RMS_OF_SEVERAL
    found = dual_output(op, (input, weight), (shape, added), backend, why_not)
    if found is not None:
        return found
    by_weight = weight is not None and may_be_differentiated(weight, input)
    if by_weight or may_be_differentiated(input, weight):
        return rms_reference.rms_norm(input, shape, weight, added)
    return F.rms_norm(input, list(shape), weight, eps)


def native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.native_layer_norm``: the norm, and mean and 1/deviation without tangents."""
    arguments = (input, normalized_shape, weight, bias, eps)
    if not _needs_formula(input, weight, bias):
        return torch.native_layer_norm(*arguments)
    formula = functools.partial(reference.layer_norm, *arguments)
    return with_value_of(torch.native_layer_norm, formula, *arguments)


def _needs_formula(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether PyTorch's rules may give wrong derivatives of the tangent.

    They are wrong by the input at first order, and by a bias without a weight at second order.
    """
    alone = weight is None and bias is not None and may_be_differentiated(bias, input)
    return alone or may_be_differentiated(input, weight, bias)


def shapes_fit(input: Tensor, shape: tuple[int, ...], *lines: Tensor | None) -> bool:
    """Whether PyTorch accepts the shapes; with others the kernels would read out of bounds."""
    whole = len(shape) > 0 and input.shape[-len(shape) :] == shape
    return whole and all(line is None or line.shape == shape for line in lines)


def is_left_to_pytorch(input: Tensor, *others: Tensor | None) -> bool:
    """Whether PyTorch's own function computes a normalization: autocast or mixed dtypes."""
    mixed = any(x is not None and x.dtype != input.dtype for x in others)
    return mixed or autocast_is_on(input.device.type)


def _layer_jvp(primals, tangents, options):
    shape, eps = options
    input, weight, bias = primals
    output, output_t, mean, rstd = layer_norm_jvp(input, shape, weight, bias, eps, *tangents)
    return output, output_t, (mean, rstd)


def _layer_vjp(saved, grad, needs, options):
    input, weight, mean, rstd = saved
    # PyTorch's backward pass does not read the bias, but requires one for the bias's gradient.
    bias = weight if needs[2] else None
    return layer_norm_vjp(grad, input, options[0], weight, bias, mean, rstd, needs)


def _layer_save(primals, output, statistics):
    return primals[0], primals[1], *statistics


def _layer_function(primals, options):
    shape, eps = options
    return reference.layer_norm(primals[0], shape, primals[1], primals[2], eps)


_LAYER = DualOp(
    function=_layer_function,
    reference=Maps(_layer_jvp, _layer_save, _layer_vjp),
    triton=norm_maps(_layer_save),
)
_LAYER_OF_BIAS_ALONE = DualOp(_layer_function, reference=None, triton=norm_maps(_layer_save))


def _rms_function(primals, options):
    shape, eps = options
    return rms_reference.rms_norm(primals[0], shape, primals[1], eps)


def _rms_jvp(primals, tangents, options):
    output, output_t, rstd = rms_norm_jvp(*primals, options[1], *tangents)
    return output, output_t, (rstd,)


def _rms_save(primals, output, statistics):
    return *primals, *statistics


_RMS = DualOp(
    function=_rms_function,
    reference=Maps(
        jvp=_rms_jvp,
        save=_rms_save,
        vjp=lambda saved, grad, needs, options: rms_norm_vjp(grad, *saved, needs),
    ),
    triton=norm_maps(_rms_save, centered=False),
)
_RMS_OF_SEVERAL = DualOp(_rms_function, reference=None, triton=norm_maps(_rms_save, centered=False))
