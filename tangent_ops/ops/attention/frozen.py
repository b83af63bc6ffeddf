"""Attention of plain tensors under `torch.func.vmap`, as one call."""

# Operands come in tuples, whose lengths pyright does not know.
# pyright: reportCallIssue=false

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class frozen_attention(TorchFunctionMode):  # noqa: N801 - a context, as fused_forward_ad
    """Context in which vmap runs plain calls of ``F.scaled_dot_product_attention`` once.

    On a CPU PyTorch would make one call for each entry, and warn. Calls whose operands have a
    tangent are to be taken before they come here, as :class:`fused_forward_ad` does.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _attention(*args, **kwargs)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
    call = functools.partial(_call, (dropout_p, *args), kwargs)
    operands = (query, key, value, attn_mask)
    # What is drawn is drawn where vmap sees it, and refuses.
    return call(*operands) if dropout_p > 0 else _Attention.apply(call, *operands)


def _call(args, kwargs, *operands):
    return F.scaled_dot_product_attention(*operands, *args, **kwargs)


class _Attention(torch.autograd.Function):
    """Without a derivative, and PyTorch says so to whoever asks for one."""

    @staticmethod
    def forward(call, *operands):
        return call(*operands)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, call, *operands):
        *operands, mask = operands
        *dims, mask_dim = in_dims[1:]
        operands = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(operands, dims, strict=True)
        ]
        axes = operands[0].ndim - 1
        if mask is None and axes > 2:  # (samples, heads, tokens, D), which the fast kernels take
            output = call(*(x.flatten(0, 1) for x in operands), None)
            return output.unflatten(0, (info.batch_size, -1)), 0
        if mask is not None and mask_dim is not None:  # masks broadcast from the right
            mask = mask.movedim(mask_dim, 0)
            mask = mask.reshape(len(mask), *(1,) * (axes + 1 - mask.ndim), *mask.shape[1:])
        return call(*operands, mask), 0
