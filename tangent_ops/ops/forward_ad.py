"""Routes calls of PyTorch's functions in a model to forward-mode versions of this library."""

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
from tangent_ops.ops.activation import gelu, silu
from tangent_ops.ops.attention.api import scaled_dot_product_attention
from tangent_ops.ops.backend import Backend, in_forward_ad, may_be_dual
from tangent_ops.ops.batch_norm import NORMS, normalize_channels
from tangent_ops.ops.checkpoint_guard import CheckpointGuard
from tangent_ops.ops.composed import glu, hardsigmoid, normalize
from tangent_ops.ops.convolution import convolution
from tangent_ops.ops.levels import enter_block, is_compiling, leave_block
from tangent_ops.ops.linear import linear
from tangent_ops.ops.norm import layer_norm, native_layer_norm, rms_norm
from tangent_ops.ops.pytorch_rules import (
    FACTORIZING,
    OVERWRITING,
    out_of_place,
    refuse_factorizations,
)
from tangent_ops.ops.refused_functions import explain
from tangent_ops.ops.softmax import softmax


def _multi_head_attention(backend: Backend | None) -> FunctionType:
    """A copy of ``F.multi_head_attention_forward`` that calls this library's operations.

    A mode is off while it handles a function, so it does not see the calls inside the function.
    Nor may the copy ask other modes, as ``torch.set_default_device``: they would run the original.
    """
    original = F.multi_head_attention_forward
    ours = {
        "scaled_dot_product_attention": scaled_dot_product_attention,
        "softmax": softmax,
    }
    names = {**vars(F), **{n: functools.partial(f, backend=backend) for n, f in ours.items()}}
    names["has_torch_function"] = lambda operands: False
    copy = FunctionType(original.__code__, names, original.__name__, original.__defaults__)
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy


def _torch_layer_norm(
    input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True, *, backend=None
) -> Tensor:
    return layer_norm(input, normalized_shape, weight, bias, eps, backend=backend)


_BACKENDS: tuple[Backend | None, ...] = (None, "triton", "reference")
# Made once, because torch.compile cannot trace it.
_MULTI_HEAD_ATTENTION = {backend: _multi_head_attention(backend) for backend in _BACKENDS}
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
# PyTorch's function, as models call it -> the function of this library.
_ROUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: linear,
    F.layer_norm: layer_norm,
    torch.layer_norm: _torch_layer_norm,
    torch.ops.aten.layer_norm.default: _torch_layer_norm,
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


def _recurrent(func, *args):
    """Run without the fused layers of oneDNN and cuDNN, which have no forward derivative."""
    kept: Any = dict.fromkeys(("deterministic", "allow_tf32", "fp32_precision"))  # as they are
    benchmark: Any = dict.fromkeys(("benchmark", "benchmark_limit"))
    mkldnn = torch.backends.mkldnn.flags(enabled=False, **kept)
    with mkldnn, torch.backends.cudnn.flags(enabled=False, **kept, **benchmark):
        return func(*args)


# PyTorch cannot differentiate the tangents of these functions, or does so wrongly.
_COMPOSED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.hardsigmoid: hardsigmoid,
    F.glu: glu,
    F.normalize: normalize,
    torch.native_layer_norm: native_layer_norm,
    torch.ops.aten.native_layer_norm.default: native_layer_norm,
}
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
# Dynamo of these releases traces only the method, and others must not see it in the set.
_METHODS = (Tensor.unflatten,) if torch.__version__ < "2.12" else ()
_TAKEN = frozenset(
    (
        *_ROUTES,
        *_CONVOLUTIONS,
        *_ATTENTION,
        *_COMPOSED,
        *_RECURRENT,
        *NORMS,
        *OVERWRITING,
        *FACTORIZING,
        *_METHODS,
    )
)


class fused_forward_ad(TorchFunctionMode):  # noqa: N801 - used like torch.no_grad
    """Context in which dual calls of ``F.scaled_dot_product_attention`` run fused.

    PyTorch's fast attention has no forward-mode derivative and raises on dual tensors. Within this
    context :func:`tangent_ops.scaled_dot_product_attention` computes dual calls of any model;
    PyTorch computes calls without a tangent. ``F.linear``, ``F.conv2d`` (1d, 3d),
    ``F.layer_norm``, ``F.rms_norm``, ``F.gelu``, ``F.silu`` and ``F.softmax`` are routed as well;
    :mod:`tangent_ops.functional` says which calls are computed where. So are dual calls whose
    tangents PyTorch does not compute, cannot differentiate, or differentiates wrongly by the input:
    ``F.hardsigmoid``, ``F.glu``, ``F.normalize``, recurrent layers, batch and instance norm, and
    functions that contain a softmax, a logsumexp or a 1-norm. Determinants and ``linalg.solve``
    raise where derivatives of their tangents would be wrong.

    Within any such context ``nn.TransformerEncoder`` and its parts take PyTorch's slow path, as
    they do when gradients are needed. In eval mode without gradients and with a padding mask, the
    fast path returns zeros at padded places and the slow path meaningless numbers. Elsewhere both
    agree within rounding.

    PyTorch has one forward-mode level for the whole process. Only one thread at a time can be in
    such a block, and no other thread can then be in a call of a linearized model. Keep a block as
    short as one forward pass, and do not wait for another thread in it.

    Example:
        >>> with fused_forward_ad():
        ...     y, y_t = torch.func.jvp(model, (x,), (v,))

    Args:
        backend: "triton", "reference", or None to choose by device.

    Raises:
        ArgumentError: an unknown backend.
        UnsupportedError: torch.inference_mode() is on, where PyTorch makes all tangents zero;
            another thread stays in such a block for a minute, or is in a torch.func.jvp outside of
            one. Calls in the block raise it where a derivative would be wrong, and for a
            ``torch.utils.checkpoint`` with forward mode around it or in it. The end of the block
            raises it in place of PyTorch's error for a module under ``fully_shard`` in a
            ``dual_level()``.
    """

    def __init__(self, backend: Backend | None = None):
        super().__init__()
        if backend not in _BACKENDS:
            raise ArgumentError(f"backend={backend!r}: expected None, 'triton' or 'reference'")
        if not is_compiling() and torch.is_inference_mode_enabled():
            raise UnsupportedError(
                "torch.inference_mode() switches forward mode off, and tangents would be zero: "
                "use torch.no_grad()"
            )
        self.backend: Backend | None = backend
        self._guard = CheckpointGuard()
        self._turns = 0  # entries of this context: Dynamo exits contexts it has not entered

    def __enter__(self):
        if is_compiling():
            return super().__enter__()
        enter_block()
        self._turns += 1
        try:
            return super().__enter__()
        except BaseException:
            self._turns -= 1
            leave_block()
            raise

    def __exit__(self, *exception):
        super().__exit__(*exception)
        if self._turns:
            self._turns -= 1
            leave_block()
            explain(exception[1])

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            self._guard.check(func)
        if func not in _TAKEN:  # first, as a ViT makes a thousand calls, attributes included
            return func(*args, **kwargs)
        if func in _METHODS and is_compiling():
            return args[0].unflatten(*args[1:], **kwargs)
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
        if func in NORMS and in_forward_ad():
            return normalize_channels(func, *args, **kwargs)
        if func in OVERWRITING:
            return out_of_place(func, *args, **kwargs)
        if func in FACTORIZING:
            refuse_factorizations(func, *args, **kwargs)
        if func in _RECURRENT and any(may_be_dual(x) for x in tree_leaves(args)):
            return _recurrent(func, *args, **kwargs)
        return func(*args, **kwargs)


class fused_calls(fused_forward_ad):  # noqa: N801 - as above
    """The same for calls of this library, which hold the lock on the levels already."""

    __enter__ = TorchFunctionMode.__enter__  # pyright: ignore[reportAssignmentType]
    __exit__ = TorchFunctionMode.__exit__  # pyright: ignore[reportAssignmentType]
