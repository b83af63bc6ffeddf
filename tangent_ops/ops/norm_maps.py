"""The normalization kernels as maps of a dual op.

Primals are x, weight and bias for a layer norm; x and weight for an RMS norm; x, residual, weight
and bias for a layer norm of x + residual, which is a second output. Options are the normalized
shape and eps.
"""

# Operands come in tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tangent_ops.ops.dual_op import Maps


def norm_maps(save: Callable, *, centered: bool = True, residual: bool = False) -> Maps:
    """Maps of the kernels.

    Args:
        save: as of :class:`Maps`; it returns what was normalized, the weight, the mean if it is
            ``centered``, and 1/deviation.
        centered: layer normalization, with a bias; False for RMS, without.
        residual: whether the second primal is added to the first.
    """
    count = 2 if residual else 1  # of outputs, and of operands shaped as x

    def unpack(operands: Sequence[Tensor | None], shape) -> Any:
        """x, residual, weight and bias as the kernels take them."""
        rows = [_rows(x, shape) for x in operands[:count]] + [None] * (2 - count)
        lines = [None if x is None else x.reshape(-1).contiguous() for x in operands[count:]]
        return rows + lines + [None] * (2 - len(lines))

    def normalized(saved, shape) -> Any:
        x, weight, *mean, rstd = saved
        weight = None if weight is None else weight.reshape(-1).contiguous()
        return _rows(x, shape), weight, mean[0].reshape(-1) if mean else None, rstd.reshape(-1)

    def cotangents(grads, shape, like):
        """Of the norm and of x + residual; the first is never absent for the kernels."""
        grad, total = (*(_rows(grad, shape) for grad in grads), None)[:2]
        return like.new_zeros(like.shape) if grad is None else grad, total

    def three(needs):
        """Whether gradients by what was normalized, by weight and by bias are needed."""
        return any(needs[:count]), needs[count], centered and needs[count + 1]

    def gradients(found, needs, like, shape):
        """Those by x, weight and bias as gradients by the primals."""
        x, weight, bias = found
        x = None if x is None else x.view(like.shape)
        lines = [None if line is None else line.view(shape) for line in (weight, bias)]
        every = ([x] * count + lines)[: len(needs)]
        return tuple(grad if need else None for grad, need in zip(every, needs, strict=True))

    def jvp(primals, tangents, options):
        from tangent_kernels import layer_norm as kernels

        shape, eps = options
        x = primals[0]
        y, y_t, total, total_t, mean, rstd = kernels.layer_norm_jvp(
            *unpack(primals, shape), *unpack(tangents, shape), eps, centered
        )
        viewed = [_shaped(z, x.shape) for z in (y, total, y_t, total_t)]
        lead = (*x.shape[: x.ndim - len(shape)], *(1 for _ in shape))
        statistics = tuple(z.view(lead) for z in (mean, rstd) if z is not None)
        return tuple(viewed[:count]), tuple(viewed[2 : 2 + count]), statistics

    def vjp(saved, grads, needs, options):
        from tangent_kernels import layer_norm as kernels

        shape = options[0]
        operands = normalized(saved, shape)
        grad, total = cotangents(grads, shape, operands[0])
        found = kernels.layer_norm_vjp(*operands, grad, total, three(needs))
        return gradients(found, needs, saved[0], shape)

    def second_vjp(primals, tangents, saved, grads, grads_t, needs, needs_t, options):
        from tangent_kernels import layer_norm as kernels

        shape = options[0]
        operands = normalized(saved, shape)
        x_t, residual_t, weight_t, _ = unpack(tangents, shape)
        if residual_t is not None:
            x_t = residual_t if x_t is None else x_t + residual_t
        grad, total = (*(_rows(grad, shape) for grad in grads), None)[:2]
        grad_t, total_t = cotangents(grads_t, shape, operands[0])
        every = (grad, grad_t, total, total_t)
        found = kernels.layer_norm_second_vjp(
            *operands, x_t, weight_t, every, three(needs), three(needs_t)
        )
        like = saved[0]
        primal = gradients(found[:3], needs, like, shape)
        return primal, gradients(found[3:], needs_t, like, shape)

    return Maps(jvp, save, vjp, second_vjp)


def _shaped(tensor: Tensor | None, shape) -> Tensor | None:
    """No view: a model could not change what a Function returns as one in place."""
    return None if tensor is None else torch.ops.aten._unsafe_view(tensor, shape)


def _rows(tensor: Tensor | None, shape) -> Tensor | None:
    """(rows, width): the kernels normalize over the last dimension."""
    return None if tensor is None else tensor.reshape(-1, math.prod(shape))
