"""Batch and instance normalization whose tangents can be differentiated by the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangent_ops.ops.composed import with_value_of
from tangent_ops.ops.pytorch_rules import may_be_differentiated


def normalize_channels(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One of ``NORMS``, with derivatives of its tangent by the input.

    PyTorch's rules take mean and deviation for constants there, without a word: as they are with
    running statistics, where PyTorch's own is right.

    Args:
        function: PyTorch's own.
        *args: its arguments; input (B, C, *spatial), plain or dual.
        **kwargs: more of them.
    """
    input, weight, bias, of_input, eps, over_batch = NORMS[function](*args, **kwargs)
    dims = [d for d in range(input.ndim) if d > 1 or (d == 0 and over_batch)]
    if not of_input or not dims or not may_be_differentiated(input, weight, bias):
        return function(*args, **kwargs)

    def words() -> Tensor:
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        x = x - x.mean(dims, keepdim=True)
        output = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
        channels = (-1, *(1 for _ in input.shape[2:]))
        if weight is not None:
            output = output * weight.view(channels)
        return output if bias is None else output + bias.view(channels)

    return with_value_of(function, words, *args, **kwargs)


# Their arguments, as (input, weight, bias, whether statistics of the input normalize it, eps,
# whether those are over the batch).
_Arguments = tuple[Tensor, Tensor | None, Tensor | None, bool, float, bool]


def _of_batch_norm(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
) -> _Arguments:
    return input, weight, bias, training, eps, True


def _of_instance_norm(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
) -> _Arguments:
    return input, weight, bias, use_input_stats, eps, False


def _of_torch_batch_norm(
    input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=None
) -> _Arguments:
    return input, weight, bias, training, eps, True


def _of_torch_instance_norm(
    input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled
) -> _Arguments:
    return input, weight, bias, use_input_stats, eps, False


_NATIVE = {
    "batch_norm": _of_torch_batch_norm,
    "native_batch_norm": _of_torch_batch_norm,
    "instance_norm": _of_torch_instance_norm,
}
NORMS: dict[Callable[..., Any], Callable[..., _Arguments]] = {
    F.batch_norm: _of_batch_norm,
    F.instance_norm: _of_instance_norm,
    **{getattr(torch, name): arguments for name, arguments in _NATIVE.items()},
    # As exported programs call them.
    **{getattr(torch.ops.aten, name).default: arguments for name, arguments in _NATIVE.items()},
}
