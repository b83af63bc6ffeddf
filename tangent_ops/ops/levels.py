"""Locks PyTorch's forward-mode level, which all threads of a process share.

A level that one thread opens is open in all threads, and its end deletes the tangents of all. Also,
two threads must not call one model while it has a temporary hook, or while ``functional_call``
replaces its parameters. So calls of this library run one at a time, and so do blocks of
``fused_forward_ad()``, in which users open levels.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._functorch import eager_transforms
from torch._guards import TracingContext
from torch.autograd import forward_ad

from tangent_ops.errors import UnsupportedError

Result = TypeVar("Result")

PATIENCE = 60.0  # seconds to wait for another thread's fused_forward_ad() to end

_LOCK = threading.RLock()  # held during a call, but not during a block
_BLOCK_ENDS = threading.Condition(_LOCK)
_caller: int | None = None  # the thread in a call with a level
_block: int | None = None  # the thread in a block
_depth = 0  # number of its nested blocks
_lent = False  # whether threads of a backward pass may run without the lock: its holder waits

_OPEN = (
    "a forward-mode level is open that this call cannot nest in: PyTorch has one for the whole "
    "process. If it is a dual_level() around the call, use torch.func.jvp, which nests. If it is "
    "another thread's, run that thread's forward-mode code in "
    "`with tangent_ops.fused_forward_ad():`, in which threads wait for each other."
)


def in_own_level(function: Callable[[], Result]) -> Result:
    """``function()`` in a new level, outside of ``torch.func``.

    Raises:
        UnsupportedError: a level is open, or another thread stays in a block.
    """
    # Not a context manager: an interrupt between two Python calls, before __exit__, would leave the
    # level open. For the same reason this calls PyTorch's C functions.
    global _caller
    me = threading.get_ident()
    with _LOCK:
        _wait_for_block()
        before, opened = _caller, True
        try:
            try:
                torch._C._enter_dual_level()  # pyright: ignore[reportAttributeAccessIssue]
            except RuntimeError as error:
                opened = False
                raise UnsupportedError(_OPEN) from error
            _wait_for_leaving()
            _caller = me
            forward_ad._current_level = 0
            return function()
        finally:
            if opened:
                # Python's state first: until then PyTorch raises if another thread opens a level.
                forward_ad._current_level = -1
                _caller = before
                torch._C._exit_dual_level(level=0)  # pyright: ignore[reportAttributeAccessIssue]


def in_transforms(function: Callable[[], Result]) -> Result:
    """``function()``, which calls ``torch.func.jvp`` inside other transforms of this thread.

    Raises:
        UnsupportedError: a level is open that these transforms did not open, or another thread
            stays in a block.
    """
    global _caller
    me = threading.get_ident()
    with _LOCK:
        _wait_for_block()
        refuse_other_levels()
        before = _caller
        try:
            _caller = me
            return function()
        finally:
            _caller = before


def refuse_other_levels() -> None:
    """Raise UnsupportedError unless this thread's ``torch.func.jvp``, if any, opened the level."""
    own = _jvps()
    if own != eager_transforms.JVP_NESTING or (forward_ad._current_level >= 0) != (own > 0):
        raise UnsupportedError(_OPEN)


def functional_call(
    module: nn.Module, parameters: Mapping[str, Any], args: Any, kwargs: Any = None
) -> Any:
    """``torch.func.functional_call``, while no other thread is in a call."""
    return in_turn(lambda: torch.func.functional_call(module, dict(parameters), args, kwargs))


def in_turn(function: Callable[[], Result]) -> Result:
    """``function()``, which may open levels, while no other thread is in a call.

    Raises:
        UnsupportedError: another thread stays in a block.
    """
    if is_compiling():  # compiled code takes no lock
        return function()
    with _LOCK:
        _wait_for_block()
        return function()


def alone(function: Callable[[], Result]) -> Result:
    """``function()``, which opens no level, while no other thread is in a call.

    It does not wait for blocks: on a GPU a backward pass runs in a thread of its own, and the
    thread that waits for it may be in a block.
    """
    if is_compiling() or (_lent and _in_a_backward_pass()):
        return function()
    with _LOCK:
        return function()


def backward(function: Callable[[], Result]) -> Result:
    """``function()``, a backward pass in a call, whose threads need not wait for the lock."""
    global _lent
    before, _lent = _lent, True
    try:
        return function()
    finally:
        _lent = before


def enter_block() -> None:
    """Keep other threads out of the levels until :func:`leave_block`; blocks nest.

    Raises:
        UnsupportedError: another thread stays in a block, or is in a ``torch.func.jvp``.
    """
    global _block, _depth
    with _LOCK:
        _wait_for_block()
        if _jvps() != eager_transforms.JVP_NESTING:
            raise UnsupportedError(_OPEN)
        _block, _depth = threading.get_ident(), _depth + 1


def leave_block() -> None:
    """End a block; the outermost one lets other threads continue."""
    global _block, _depth
    with _LOCK:
        _depth -= 1
        if _depth == 0:
            _block = None
            _BLOCK_ENDS.notify_all()


def is_compiling() -> bool:
    """``torch.compiler.is_compiling()`` for this thread; PyTorch's flag is process-wide."""
    return torch.compiler.is_dynamo_compiling() or (
        torch.compiler.is_compiling() and TracingContext.try_get() is not None
    )


def called_elsewhere() -> bool:
    """Whether another thread is in a call with a level that does not involve this thread.

    A thread in which PyTorch runs a backward pass counts as the caller's.
    """
    caller = _caller
    return caller is not None and caller != threading.get_ident() and not _in_a_backward_pass()


def _in_a_backward_pass() -> bool:
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]


def _wait_for_block() -> None:
    """Wait for another thread's block to end; the lock is held before and after, not meanwhile."""
    if _block is None or _block == threading.get_ident():
        return
    if not _BLOCK_ENDS.wait_for(lambda: _block is None, PATIENCE):
        raise UnsupportedError(
            f"another thread has been in `with tangent_ops.fused_forward_ad():` for more than "
            f"{PATIENCE:g} s. PyTorch has one forward-mode level for the whole process, so threads "
            "wait for each other: enter that context for one forward pass at a time, and do not "
            "wait for other threads in it."
        )


def _wait_for_leaving() -> None:
    """Wait until a thread that left a level of its own has reset the Python state."""
    end = time.monotonic() + 1.0
    while forward_ad._current_level >= 0:
        if time.monotonic() > end:
            raise UnsupportedError(_OPEN)
        time.sleep(0)


def _jvps() -> int:
    """The number of ``torch.func.jvp`` in this thread's stack; PyTorch's count has all threads'."""
    return sum(each.key() == TransformType.Jvp for each in get_interpreter_stack() or ())


def _after_fork() -> None:
    """Reset the state in a child process, which has no other threads."""
    global _block, _depth
    if _block != threading.get_ident():
        _block, _depth = None, 0
    _LOCK.release()


# Fork only between calls: no level is open then, and every module has its own parameters.
os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_after_fork)
