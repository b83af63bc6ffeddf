"""Wraps the normalization kernels as maps of a dual op.

The primals of a layer norm are x, weight and bias; those of an RMS norm are x and weight. The
options are the normalized shape and eps.
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


def norm_maps(save: Callable, *, centered: bool = True) -> Maps:
    """The kernels' maps.

    Args:
        save: as in :class:`Maps`; it returns x, the weight, the mean if ``centered``, and
            1/deviation.
        centered: True for layer normalization, with a bias; False for RMS, without.
    """

    def unpack(operands: Sequence[Tensor | None], shape) -> Any:
        """x, weight and bias, or their tangents, as the kernels take them."""
        x, *lines = operands
        return _rows(x, shape), *map(_line, lines), *(() if centered else (None,))

    def normalized(saved, shape) -> Any:
        x, weight, *mean, rstd = saved
        mean = mean[0].contiguous() if mean else None
        return _rows(x, shape), _line(weight), mean, rstd.contiguous()

    def three(needs):
        """Which gradients by x, weight and bias are needed."""
        return needs if centered else (*needs, False)

    def gradients(found, needs, like, shape):
        """The kernels' gradients in the shapes of the primals."""
        x, *lines = found[: len(needs)]
        if len(shape) == 1:  # they have them
            return x, *lines
        x = None if x is None else x.view(like.shape)
        return x, *(None if line is None else line.view(shape) for line in lines)

    def jvp(primals, tangents, options):
        from tangent_kernels import layer_norm as kernels

        shape, eps = options
        x = primals[0]
        y, y_t, mean, rstd = kernels.layer_norm_jvp(
            *unpack(primals, shape), *unpack(tangents, shape), eps, centered
        )
        if len(shape) == 1:
            return y, y_t, (rstd,) if mean is None else (mean, rstd)
        lead = (*x.shape[: x.ndim - len(shape)], *(1 for _ in shape))
        statistics = tuple(z.view(lead) for z in (mean, rstd) if z is not None)
        return _shaped(y, x.shape), _shaped(y_t, x.shape), statistics

    def vjp(saved, grad, needs, options):
        from tangent_kernels import layer_norm as kernels

        shape = options[0]
        found = kernels.layer_norm_vjp(*normalized(saved, shape), _rows(grad, shape), three(needs))
        return gradients(found, needs, saved[0], shape)

    def second_vjp(primals, tangents, saved, grad, grad_t, needs, needs_t, options):
        from tangent_kernels import layer_norm as kernels

        shape = options[0]
        x_t, weight_t, _ = unpack(tangents, shape)
        both = (_rows(grad, shape), _rows(grad_t, shape))
        found = kernels.layer_norm_second_vjp(
            *normalized(saved, shape), x_t, weight_t, both, three(needs), three(needs_t)
        )
        like = saved[0]
        primal = gradients(found[:3], needs, like, shape)
        return primal, gradients(found[3:], needs_t, like, shape)

    return Maps(jvp, save, vjp, second_vjp)


def _shaped(tensor: Tensor, shape) -> Tensor:
    """The tensor in that shape, not as a view: a view from a Function cannot change in place."""
    return torch.ops.aten._unsafe_view(tensor, shape)


def _rows(tensor: Tensor | None, shape) -> Any:
    """(..., width): the kernels normalize over the last dimension."""
    if tensor is None or len(shape) == 1:
        return tensor
    return tensor.reshape(-1, math.prod(shape))


def _line(tensor: Tensor | None) -> Tensor | None:
    """(width,), contiguous."""
    if tensor is None or (tensor.ndim == 1 and tensor.is_contiguous()):
        return tensor
    return tensor.reshape(-1).contiguous()
