"""Routes the heavy operations of any model to their fused forward-mode versions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.functional import (
    convolution,
    gelu,
    layer_norm,
    linear,
    rms_norm,
    scaled_dot_product_attention,
    silu,
    softmax,
)
from tangent_ops.functional._backend import Backend, in_forward_ad, may_be_dual


def _multi_head_attention(backend: Backend | None) -> FunctionType:
    """``F.multi_head_attention_forward`` (nn.MultiheadAttention) around this library's attention.

    A mode is off while it handles a function, so it would not see the call inside that one.
    """
    original = F.multi_head_attention_forward
    attention = functools.partial(scaled_dot_product_attention, backend=backend)
    names = {**vars(F), "scaled_dot_product_attention": attention}
    copy = FunctionType(original.__code__, names, original.__name__, original.__defaults__)
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy


_BACKENDS: tuple[Backend | None, ...] = (None, "triton", "reference")
# Made once: torch.compile cannot trace the making.
_MULTI_HEAD_ATTENTION = {backend: _multi_head_attention(backend) for backend in _BACKENDS}
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
# PyTorch's name of an operation, as models call it, and ours.
_ROUTES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: linear,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.gelu: gelu,
    F.silu: silu,
    F.softmax: lambda input, dim=None, _stacklevel=3, dtype=None, backend=None: (
        F.softmax(input, dim, _stacklevel, dtype)
        if dim is None
        else softmax(input, dim, dtype, backend=backend)
    ),
    torch.softmax: softmax,
    Tensor.softmax: softmax,
}


def _hardsigmoid(input, inplace=False):
    output = F.relu6(input + 3) / 6
    return input.copy_(output) if inplace else output


def _glu(input, dim=-1):
    first, gate = input.split(input.shape[dim] // 2, dim)
    return first * gate.sigmoid()


def _normalize(input, p=2.0, dim=1, eps=1e-12, out=None):
    if p != 2.0 or out is not None or input.is_complex():
        return F.normalize(input, p, dim, eps, out)
    squares = input.to(torch.promote_types(input.dtype, torch.float32)).square()
    total = squares.sum(dim, keepdim=True)
    nothing = total == 0  # of padding, say: the root has no slope there, and PyTorch's rule a NaN
    norm = total.masked_fill(nothing, 1.0).sqrt().masked_fill(nothing, 0.0)
    return input / norm.to(input.dtype).clamp_min(eps)


def _recurrent(func, *args):
    """Its products one by one: the fused layers of oneDNN and cuDNN have no forward derivative."""
    kept: Any = dict.fromkeys(("deterministic", "allow_tf32", "fp32_precision"))  # as they are
    benchmark: Any = dict.fromkeys(("benchmark", "benchmark_limit"))
    mkldnn = torch.backends.mkldnn.flags(enabled=False, **kept)
    with mkldnn, torch.backends.cudnn.flags(enabled=False, **kept, **benchmark):
        return func(*args)


# PyTorch cannot differentiate their tangents; those of the same map in other words it can.
_COMPOSED = {F.hardsigmoid: _hardsigmoid, F.glu: _glu, F.normalize: _normalize}
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
_TAKEN = frozenset((*_ROUTES, *_CONVOLUTIONS, *_ATTENTION, *_COMPOSED, *_RECURRENT))


class fused_forward_ad(TorchFunctionMode):  # noqa: N801 - used like torch.no_grad
    """Context in which dual calls of ``F.scaled_dot_product_attention`` run fused.

    PyTorch's fast attention has no forward-mode derivative and raises on dual tensors. Within
    this context such calls go to :func:`tangent_ops.scaled_dot_product_attention`, whatever model
    makes them; calls without a tangent stay PyTorch's. ``F.linear``, ``F.conv2d`` (1d, 3d),
    ``F.layer_norm``, ``F.rms_norm``, ``F.gelu``, ``F.silu`` and ``F.softmax`` are routed too:
    :mod:`tangent_ops.functional` says what is gained where. So are dual calls of
    ``F.hardsigmoid``, ``F.glu``, ``F.normalize`` and recurrent layers, whose tangents PyTorch does
    not compute or cannot differentiate.

    Example:
        >>> with fused_forward_ad():
        ...     y, y_t = torch.func.jvp(model, (x,), (v,))

    Args:
        backend: None chooses by device; "triton" or "reference" insists.

    Raises:
        ArgumentError: there is no such backend.
        UnsupportedError: in torch.inference_mode(), where PyTorch makes all tangents zero.
    """

    def __init__(self, backend: Backend | None = None):
        super().__init__()
        if backend not in _BACKENDS:
            raise ArgumentError(f"backend={backend!r}: expected None, 'triton' or 'reference'")
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            raise UnsupportedError(
                "torch.inference_mode() switches forward mode off, and tangents would be zero: "
                "use torch.no_grad()"
            )
        self.backend: Backend | None = backend

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _TAKEN:  # a thousand calls of a ViT's forward pass, attributes too
            return func(*args, **kwargs)
        if func in _ROUTES and in_forward_ad():
            return _ROUTES[func](*args, **kwargs, backend=self.backend)
        if func in _CONVOLUTIONS:
            return convolution(func, *args, **kwargs)
        if func in _ATTENTION and any(may_be_dual(x) for x in (*args, *kwargs.values())):
            if func is F.multi_head_attention_forward:
                return _MULTI_HEAD_ATTENTION[self.backend](*args, **kwargs)
            return scaled_dot_product_attention(*args, **kwargs, backend=self.backend)
        if func in _COMPOSED and any(may_be_dual(x) for x in (*args, *kwargs.values())):
            return _COMPOSED[func](*args, **kwargs)
        if func in _RECURRENT and any(may_be_dual(x) for x in tree_leaves(args)):
            return _recurrent(func, *args, **kwargs)
        return func(*args, **kwargs)
