"""Names the operation of a model that has no derivative, in PyTorch's error."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from types import FrameType

from torch import nn

from tangent_ops.errors import UnsupportedError
from tangent_ops.ops.checkpoint_guard import CHECKPOINT_MESSAGE

# PyTorch's error messages.
_NO_FORWARD = re.compile(r"Trying to use forward AD with (\S+) that does not support it")
_NO_JVP = re.compile(r"must implement the jvp function for custom autograd\.Function")
_NESTED = "Nested forward mode AD is not supported"
_NO_BACKWARD = re.compile(r"derivative for (\S+) is not implemented")


@contextlib.contextmanager
def naming_what_lacks(anchor: nn.Module) -> Iterator[None]:
    """Turn PyTorch's error for a missing derivative into one with the place and a way out."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if _NESTED in str(error):
            raise UnsupportedError(
                "forward mode within forward mode: PyTorch's dual levels do not nest. Use "
                "torch.func.jvp around a linearized model; a model that uses forward mode itself "
                "cannot be linearized"
            ) from error
        if _within_checkpoint(error):
            raise UnsupportedError(CHECKPOINT_MESSAGE) from error
        lacking = _lacking(error)
        if lacking is None:
            raise
        raise UnsupportedError(
            f"{lacking}{_caller(error, anchor)}. Train only parameters above it (`trainable`), "
            "or replace it by operations that have a derivative."
        ) from error


def _lacking(error: Exception) -> str | None:
    """The missing derivative, for a message; None where the error is about something else."""
    text = str(error)
    if found := _NO_FORWARD.search(text):
        return f"{found[1]} has no forward-mode derivative in PyTorch"
    if found := _NO_BACKWARD.search(text):
        return f"{found[1]}, in the backward pass of a tangent, has no derivative in PyTorch"
    if _NO_JVP.search(text):
        name = getattr(_function(error), "__name__", "a Function")
        return f"{name}, a torch.autograd.Function, has no jvp() and so no forward-mode derivative"
    return None


def _within_checkpoint(error: Exception) -> bool:
    """Whether torch.utils.checkpoint's own Function lacks the jvp, as up to PyTorch 2.11."""
    named = _NO_JVP.search(str(error)) is not None
    return named and getattr(_function(error), "__module__", "") == "torch.utils.checkpoint"


def _function(error: Exception) -> type | None:
    """The torch.autograd.Function without a jvp()."""
    owner = _frames(error)[-2].f_locals.get("self")
    return getattr(owner, "_forward_cls", None)


def _caller(error: Exception, anchor: nn.Module) -> str:
    """The innermost module that was running, with its name if the anchor has it."""
    running = [frame.f_locals.get("self") for frame in _frames(error)]
    modules = [module for module in running if isinstance(module, nn.Module)]
    if not modules:
        return ""
    kind = type(modules[-1]).__name__
    names = {id(module): name for name, module in anchor.named_modules()}
    for root in modules:  # the anchor, or its copy
        names |= {id(module): name for name, module in root.named_modules()}
        if type(root) is type(anchor):
            break
    name = names.get(id(modules[-1]))
    return f"; {kind} calls it" + (f", as {name}" if name else "")


def _frames(error: Exception) -> list[FrameType]:
    found, here = [], error.__traceback__
    while here is not None:
        found.append(here.tb_frame)
        here = here.tb_next
    return found
