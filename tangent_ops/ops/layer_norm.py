"""Layer normalization for plain and dual tensors, also of a sum."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tangent_ops.errors import ArgumentError
from tangent_ops.ops.backend import Backend, autocast_is_on, why_not_in_rows
from tangent_ops.ops.composed import with_value_of
from tangent_ops.ops.dual_op import DualOp, Maps, dual_outputs
from tangent_ops.ops.norm_maps import norm_maps
from tangent_ops.ops.pytorch_rules import may_be_differentiated
from tangent_ops.ops.reference import layer_norm as reference
from tangent_ops.ops.reference.layer_norm import layer_norm_jvp, layer_norm_vjp


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

    Where x, w and b are frozen the gradients of the tangents are the ordinary ones, and no tangent
    is kept for them. Under autocast, with mixed dtypes, and where :mod:`tangent_ops.functional`
    says so, it is PyTorch's own function; or plain operations, where derivatives of the tangent by
    x may be asked for, because PyTorch's own gets them wrong in silence.

    Args:
        input: (..., *normalized_shape), plain or dual.
        normalized_shape: the trailing dimensions that are normalized together.
        weight: normalized_shape, plain or dual, or None for ones.
        bias: normalized_shape, plain or dual, or None for zeros.
        eps: added to the variance.
        backend: None chooses by device; "triton" or "reference" insists.

    Returns:
        As ``input``, dual if an input is.

    Raises:
        UnsupportedError: ``backend="triton"`` and the kernels do not compute this call.
    """
    shape = tuple(normalized_shape)
    if not shapes_fit(input, shape, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # which says why not
    found = None
    if not is_left_to_pytorch(input, weight, bias):
        # PyTorch's backward pass with a bias alone is not differentiable once more.
        bias_alone = weight is None and bias is not None
        op = _OF_BIAS_ALONE if bias_alone else _OP
        why_not = why_not_in_rows(input, math.prod(shape))
        found = dual_outputs(op, (input, weight, bias), (shape, eps), backend, why_not)
    if found:
        return found[0]
    if may_be_differentiated(input, weight, bias):
        # Nor can Dynamo trace PyTorch's own for a dual input with plain weights.
        return reference.layer_norm(input, shape, weight, bias, eps)
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.native_layer_norm``: the norm, and mean and 1/deviation, which have no tangents."""
    arguments = (input, normalized_shape, weight, bias, eps)
    if not may_be_differentiated(input, weight, bias):
        return torch.native_layer_norm(*arguments)
    words = functools.partial(reference.layer_norm, *arguments)
    return with_value_of(torch.native_layer_norm, words, *arguments)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """``layer_norm(input + residual)`` and ``input + residual``, with their tangents.

    On CUDA one pass: the sum is read by no second one, in either direction. Arguments are those of
    :func:`layer_norm`; ``residual`` is as ``input``.

    Raises:
        ArgumentError: shapes or dtypes of ``input`` and ``residual`` differ.
        UnsupportedError: ``backend="triton"`` and the kernels do not compute this call.
    """
    if input.shape != residual.shape or input.dtype != residual.dtype:
        raise ArgumentError(
            f"input is {tuple(input.shape)}, {input.dtype}, but residual {tuple(residual.shape)}, "
            f"{residual.dtype}: expected the same of both"
        )
    shape = tuple(normalized_shape)
    primals = (input, residual, weight, bias)
    fits = shapes_fit(input, shape, weight, bias) and not is_left_to_pytorch(*primals)
    if backend != "reference" and fits:
        why_not = why_not_in_rows(input, math.prod(shape))
        if backend == "triton" or (input.is_cuda and why_not is None):
            found = dual_outputs(_ADDED, primals, (shape, eps), backend, why_not)
            if found:
                return found[0], found[1]
    total = input + residual
    return layer_norm(total, shape, weight, bias, eps, backend=backend), total


def shapes_fit(input: Tensor, shape: tuple[int, ...], *lines: Tensor | None) -> bool:
    """Whether PyTorch takes such shapes; the formulas broadcast others, the kernels read beyond."""
    whole = len(shape) > 0 and input.shape[-len(shape) :] == shape
    return whole and all(line is None or line.shape == shape for line in lines)


def is_left_to_pytorch(input: Tensor, *others: Tensor | None) -> bool:
    """Whether a normalization's dtypes are for PyTorch's own function to sort out."""
    mixed = any(x is not None and x.dtype != input.dtype for x in others)
    return mixed or autocast_is_on(input.device.type)


def _jvp(primals, tangents, options):
    shape, eps = options
    input, weight, bias = primals
    output, output_t, mean, rstd = layer_norm_jvp(input, shape, weight, bias, eps, *tangents)
    return (output,), (output_t,), (mean, rstd)


def _vjp(saved, grads, needs, options):
    input, weight, mean, rstd = saved
    # Where the bias's gradient is asked for, any bias will do.
    bias = weight if needs[2] else None
    return layer_norm_vjp(grads[0], input, options[0], weight, bias, mean, rstd, needs)


def _save(primals, outputs, statistics):
    return primals[0], primals[1], *statistics


def _added_vjp(saved, grads, needs, options):
    """By PyTorch's passes, differentiable: cotangents of the norm and of the sum."""
    by_total = None
    rest = (None, None)
    if grads[0] is not None:
        wanted = (any(needs[:2]), *needs[2:])
        by_total, *rest = _vjp(saved, grads, wanted, options)
    if grads[1] is not None:
        by_total = grads[1] if by_total is None else by_total + grads[1]
    return *(by_total if need else None for need in needs[:2]), *rest


def _function(primals, options):
    shape, eps = options
    return (reference.layer_norm(primals[0], shape, primals[1], primals[2], eps),)


def _added(primals, options):
    total = primals[0] + primals[1]
    return (*_function((total, *primals[2:]), options), total)


_OP = DualOp(
    function=_function,
    outputs=1,
    reference=Maps(_jvp, _save, _vjp),
    triton=norm_maps(_save),
)
_OF_BIAS_ALONE = DualOp(_function, 1, reference=None, triton=norm_maps(_save))


def _save_added(primals, outputs, statistics):
    return outputs[1], primals[2], *statistics


_ADDED = DualOp(
    function=_added,
    outputs=2,
    reference=Maps(_jvp, _save_added, _added_vjp),
    triton=norm_maps(_save_added, residual=True),
)
