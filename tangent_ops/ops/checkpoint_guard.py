"""Raises for ``torch.utils.checkpoint`` in forward mode within ``fused_forward_ad``.

A checkpoint repeats its function in the backward pass, without function modes and without a level
that was open around it. Gradients would come from PyTorch's own rules, where they exist. With
``use_reentrant=True`` the forward pass itself drops tangents of the function's parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import checkpoint

from tangent_ops.errors import UnsupportedError
from tangent_ops.ops.levels import is_compiling

_REENTRANT = checkpoint.CheckpointFunction.forward.__code__
CHECKPOINT_MESSAGE = (
    "torch.utils.checkpoint with forward mode around it or in it, within fused_forward_ad(): its "
    "function is repeated without that context and level. Put `with fused_forward_ad():` and the "
    "level inside the function, or switch the model's checkpointing off: a linearized model has "
    "its own, set_grad_checkpointing()"
)


class CheckpointGuard:
    """Checks the functions that are called within one ``fused_forward_ad`` context."""

    def __init__(self) -> None:
        self._allowed = None if is_compiling() else saved_tensors_hook()
        self._in_reentrant = False

    def check(self, func: Callable[..., Any]) -> None:
        """Check one function of PyTorch before it runs.

        Raises:
            UnsupportedError: forward mode is on inside a checkpoint that began in the context.
        """
        if func is torch._C._set_grad_enabled:
            self._in_reentrant = _begins_reentrant(self._in_reentrant)
        hook, repeats = saved_tensors_hook(), self._in_reentrant
        if hook is not None and hook is not self._allowed:
            repeats |= hook.__qualname__.startswith("_checkpoint_hook")
        # _current_level, since in_forward_ad() is False in the forward method of a Function.
        if repeats and forward_ad._current_level >= 0:
            if func is torch._C._set_grad_enabled:
                self._in_reentrant = False  # the error ends the checkpoint
            raise UnsupportedError(CHECKPOINT_MESSAGE)


def saved_tensors_hook() -> Any:
    """The active hook on saved tensors, or None."""
    autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    hooks = autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


def _begins_reentrant(before: bool) -> bool:
    """Whether a reentrant checkpoint is the caller and enters no_grad; else ``before``."""
    frame: FrameType | None = sys._getframe(3)
    names = set()
    for _ in range(4):  # no_grad.__enter__ or __exit__, and set_grad_enabled.__init__, come first
        if frame is None:
            break
        if frame.f_code is _REENTRANT:
            return "__exit__" not in names
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return before
