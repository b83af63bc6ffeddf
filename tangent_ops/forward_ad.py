"""Routes the heavy operations of any model to their fused forward-mode versions."""

from __future__ import annotations

import functools
from types import FunctionType

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.functional import (
    convolution,
    gelu,
    layer_norm,
    linear,
    scaled_dot_product_attention,
)
from tangent_ops.functional._backend import Backend, may_be_dual


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


def _hardsigmoid(input, inplace=False):
    output = F.relu6(input + 3) / 6
    return input.copy_(output) if inplace else output


def _glu(input, dim=-1):
    first, gate = input.split(input.shape[dim] // 2, dim)
    return first * gate.sigmoid()


def _recurrent(func, *args):
    """Its products one by one: the fused layers of oneDNN and cuDNN have no forward derivative."""
    libraries = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [library.enabled for library in libraries]
    try:
        for library in libraries:
            library.enabled = False  # pyright: ignore[reportAttributeAccessIssue]
        return func(*args)
    finally:
        for library, enabled in zip(libraries, before, strict=True):
            library.enabled = enabled  # pyright: ignore[reportAttributeAccessIssue]


# PyTorch cannot differentiate their tangents; those of the same map in other words it can.
_COMPOSED = {F.hardsigmoid: _hardsigmoid, F.glu: _glu}
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


class fused_forward_ad(TorchFunctionMode):  # noqa: N801 - used like torch.no_grad
    """Context in which dual calls of ``F.scaled_dot_product_attention`` run fused.

    PyTorch's fast attention has no forward-mode derivative and raises on dual tensors. Within
    this context such calls go to :func:`tangent_ops.scaled_dot_product_attention`, whatever model
    makes them; calls without a tangent stay PyTorch's. ``F.linear``, ``F.conv2d`` (1d, 3d),
    ``F.layer_norm`` and ``F.gelu`` are routed too, to forms that need less memory or fewer
    products in a plain ``dual_level()``; so are dual calls of ``F.hardsigmoid``, ``F.glu`` and of
    recurrent layers, whose tangents PyTorch does not compute or cannot differentiate.

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
        if func is F.linear:
            return linear(*args, **kwargs)
        if func in _CONVOLUTIONS:
            return convolution(func, *args, **kwargs)
        if func is F.layer_norm:
            return layer_norm(*args, **kwargs)
        if func is F.gelu:
            return gelu(*args, **kwargs)
        if func in _ATTENTION and any(may_be_dual(x) for x in (*args, *kwargs.values())):
            if func is F.multi_head_attention_forward:
                return _MULTI_HEAD_ATTENTION[self.backend](*args, **kwargs)
            return scaled_dot_product_attention(*args, **kwargs, backend=self.backend)
        if func in _COMPOSED and any(may_be_dual(x) for x in (*args, *kwargs.values())):
            return _COMPOSED[func](*args, **kwargs)
        if func in _RECURRENT and any(may_be_dual(x) for x in tree_leaves(args)):
            return _recurrent(func, *args, **kwargs)
        return func(*args, **kwargs)
