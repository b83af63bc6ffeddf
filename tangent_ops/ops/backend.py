"""Chooses the backend of an op, and reads the forward-mode state that limits the choice."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.ops.levels import called_elsewhere, is_compiling

Backend = Literal["triton", "reference"]

MAX_WIDTH = 4096  # tangent_kernels._rows.MAX_WIDTH, which cannot be imported without Triton

# Set by tools.rehearsal, which launches kernels with tensors on the CPU and runs none.
cpu_stands_for_cuda = False

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def choose_backend(backend: Backend | None, tensor: Tensor, reason: str | None) -> Backend:
    """Choose the backend by device, or check that the named one can compute the call.

    Args:
        backend: the caller's choice; None to choose by device.
        tensor: an operand, for its device.
        reason: why the Triton kernels cannot compute this call, or None if they can.

    Raises:
        ArgumentError: an unknown backend.
        UnsupportedError: the Triton backend cannot compute the call, or Triton is not installed.
    """
    if backend not in (None, "triton", "reference"):
        raise ArgumentError(f"backend={backend!r}: expected None, 'triton' or 'reference'")
    on_cuda = tensor.is_cuda or cpu_stands_for_cuda
    chosen = backend or ("triton" if on_cuda and reason is None else "reference")
    if chosen == "triton":
        if reason is None and not on_cuda and not interpreting():
            reason = f"tensors are on {tensor.device}, the kernels run on CUDA devices"
        if reason is not None:
            raise UnsupportedError(
                f"backend='triton': {reason}. Use backend=None or backend='reference'."
            )
        if not _TRITON_IS_INSTALLED:
            raise UnsupportedError(
                f"tensors are on {tensor.device}, and Triton, which the kernels need, is not "
                "installed: `pip install triton`, or pass backend='reference'"
            )
    return chosen


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def in_forward_ad() -> bool:
    """Whether a forward-mode level is active: ``dual_level()`` or ``torch.func.jvp``.

    False where forward mode is switched off, and for the level of a linearized call in another
    thread.
    """
    # Dynamo cannot trace the other calls, and compiled code needs no check for other threads.
    return forward_ad._current_level >= 0 and (
        torch.compiler.is_dynamo_compiling()
        or (torch._C._is_fwd_grad_enabled() and not called_elsewhere())
    )


def in_plain_dual_level() -> bool:
    """Whether a ``dual_level()`` is active, no torch.func transform is, and nothing is compiled."""
    return in_forward_ad() and not is_compiling() and peek_interpreter_stack() is None


def is_traced() -> bool:
    """Whether ``make_fx`` traces the computation, as in ``torch.func.linearize``.

    The trace loses results of kernel launches, ``out=`` and in-place operations: it drops them as
    unused, or writes them into constants of the graph.
    """
    return get_proxy_mode() is not None


def why_not_in_float(tensor: Tensor) -> str | None:
    """Why the elementwise kernels cannot compute with this tensor; None if they can."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {tensor.dtype} is not one of float16, bfloat16, float32"
    return None if tensor.numel() else "it has no elements"


def why_not_in_rows(tensor: Tensor, width: int) -> str | None:
    """The same for the kernels that hold whole rows of ``width`` elements."""
    if width > MAX_WIDTH:
        return f"rows of {width} elements are longer than {MAX_WIDTH}"
    return why_not_in_float(tensor)


def save_for_tangents(ctx: Any, output: Tensor, *saved: Tensor | None) -> None:
    """Save tensors in the forward of a Function that is differentiable by its tangents only."""
    ctx.save_for_backward(*saved)
    # Without this mark autograd would treat the output as depending on the tangents.
    ctx.mark_non_differentiable(output)
    ctx.set_materialize_grads(False)


def autocast_is_on(device: str) -> bool:
    """Whether autocast is on for this device type; some types ("meta") have no autocast."""
    # Dynamo of torch 2.11 cannot trace is_autocast_available, and compiles for no such type.
    available = torch.compiler.is_dynamo_compiling() or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def autocast(device: str, *operands: Tensor | None) -> tuple[Any, ...]:
    """The operands, in autocast's dtype if autocast is on, as in PyTorch's products."""
    if not autocast_is_on(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    taken = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(x.to(dtype) if x is not None and x.dtype in taken else x for x in operands)


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Context in which products keep their operands' dtype."""
    return torch.autocast(device, enabled=False) if autocast_is_on(device) else nullcontext()


def tangents_are_hidden() -> bool:
    """Whether vmap or grad runs inside a forward-mode level (jvp of vmap, jvp of grad).

    PyTorch shows no tangents there, whether a tensor has one or not.
    """
    if not in_forward_ad() or is_compiling():
        return False
    interpreter = peek_interpreter_stack()
    return interpreter is not None and interpreter.key() != TransformType.Jvp


def may_be_dual(tensor: object) -> bool:
    """Whether a value is a tensor that has, or may have, a tangent of the active level."""
    if not isinstance(tensor, Tensor) or not in_forward_ad():
        return False
    return tangents_are_hidden() or forward_ad.unpack_dual(tensor).tangent is not None


def reverse_mode_reaches(*tensors: Tensor | None) -> bool:
    """Whether reverse mode, at any nesting level of ``torch.func``, tracks one of the tensors.

    Then derivatives by a dual tensor's primal may be computed *inside* the forward-mode level
    (forward over reverse), where a formula on unpacked tensors would be silently wrong.
    """
    for tensor in tensors:
        while tensor is not None:
            if tensor.requires_grad:
                return True
            if not is_functorch_wrapped_tensor(tensor):
                break
            tensor = get_unwrapped(tensor)
    return False
