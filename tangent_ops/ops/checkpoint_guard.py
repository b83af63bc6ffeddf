"""Refuses ``torch.utils.checkpoint`` that begins within ``fused_forward_ad`` and has a level.

It repeats its function in the backward pass, where PyTorch switches function modes off: without the
context, and without a level that was opened around it. Gradients would be PyTorch's own, where it
has them. With ``use_reentrant=True`` tangents of the function's parameters are dropped already in
the forward pass.
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
_MESSAGE = (
    "torch.utils.checkpoint, with forward mode around it or in it, within fused_forward_ad(): its "
    "function is repeated without that context and level. Put `with fused_forward_ad():` and the "
    "level inside of the function; or switch checkpointing off in the model: a linearized model "
    "has its own, set_grad_checkpointing()"
)


class CheckpointGuard:
    """Watches the functions that are called within one ``fused_forward_ad`` context."""

    def __init__(self) -> None:
        self._allowed = None if is_compiling() else saved_tensors_hook()
        self._in_reentrant = False

    def check(self, func: Callable[..., Any]) -> None:
        """Call it with every function of PyTorch, before the function runs.

        Raises:
            UnsupportedError: forward mode is on, and a checkpoint that began in the context.
        """
        if func is torch._C._set_grad_enabled:
            self._in_reentrant = _begins_reentrant(self._in_reentrant)
        hook, repeats = saved_tensors_hook(), self._in_reentrant
        if hook is not None and hook is not self._allowed:
            repeats |= hook.__qualname__.startswith("_checkpoint_hook")
        # The level itself: tangents are off in the forward method of a Function.
        if repeats and forward_ad._current_level >= 0:
            if func is torch._C._set_grad_enabled:
                self._in_reentrant = False  # it does not begin
            raise UnsupportedError(_MESSAGE)


def saved_tensors_hook() -> Any:
    """What autograd does with saved tensors now; None where it just keeps them."""
    autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    hooks = autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


def _begins_reentrant(before: bool) -> bool:
    """Whether the reentrant checkpoint switches gradients off now; ``before`` if it is another."""
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
