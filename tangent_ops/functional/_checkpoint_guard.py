"""Refuses ``torch.utils.checkpoint`` within a forward-mode level.

It repeats its function in the backward pass, when the level is over: without tangents. With
``use_reentrant=True`` the function's own parameters get no tangent in the first place.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import checkpoint

from tangent_ops._threads import is_compiling
from tangent_ops.errors import UnsupportedError

_CHECKPOINT = inspect.unwrap(checkpoint.checkpoint).__code__
_REENTRANT = checkpoint.CheckpointFunction.forward.__code__
_MESSAGE = (
    "torch.utils.checkpoint within a forward-mode level: it repeats its function when the level is "
    "over, without tangents. Switch checkpointing off in the model; a linearized model has its "
    "own, set_grad_checkpointing()"
)


class CheckpointGuard:
    """Watches the functions that are called within one ``fused_forward_ad`` context."""

    def __init__(self) -> None:
        self._allowed = None if is_compiling() else saved_tensors_hook()

    def check(self, func: Callable[..., Any]) -> None:
        """Call it with every function of PyTorch, before the function runs.

        Raises:
            UnsupportedError: a checkpoint that began within the level is active.
        """
        hook = saved_tensors_hook()
        if hook is not None and hook is not self._allowed:
            named = hook.__qualname__.startswith("_checkpoint_hook")
            if named and _in_a_level() and _began_within_the_level():
                raise UnsupportedError(_MESSAGE)
            self._allowed = hook
        if func is torch._C._set_grad_enabled and _in_a_level() and _in_reentrant_forward():
            raise UnsupportedError(_MESSAGE)


def _in_a_level() -> bool:
    """Also where tangents are switched off, as in the forward method of a Function."""
    return forward_ad._current_level >= 0


def saved_tensors_hook() -> Any:
    """What autograd does with saved tensors now; None where it just keeps them."""
    autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    hooks = autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


def _began_within_the_level() -> bool:
    """Whether the active checkpoint did. A ``dual_level()`` leaves no trace: then it is assumed."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _CHECKPOINT:
            return True
        if frame.f_globals.get("__name__") == "torch._functorch.eager_transforms":
            return False
        frame = frame.f_back
    return True


def _in_reentrant_forward() -> bool:
    """Whether the reentrant checkpoint is what switches gradients off."""
    frame: FrameType | None = sys._getframe(3)
    for _ in range(3):  # no_grad.__enter__ and set_grad_enabled.__init__ come first
        if frame is None or frame.f_code is _REENTRANT:
            break
        frame = frame.f_back
    return frame is not None and frame.f_code is _REENTRANT
