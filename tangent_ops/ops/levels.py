"""What PyTorch has once for the whole process, and threads that take turns at it.

It has one forward-mode level: what a thread opens is open in all of them, and what it leaves takes
every thread's tangents along. Nor may two threads be in one model while it has a hook, or
``functional_call`` has put other tensors in the place of its parameters. So calls of this library
run one at a time, and so do blocks of ``fused_forward_ad()``, whose levels are the user's.
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

PATIENCE = 60.0  # seconds for a fused_forward_ad() of another thread to end

_LOCK = threading.RLock()  # held in a call, which ends by itself; not in a block
_BLOCK_ENDS = threading.Condition(_LOCK)
_caller: int | None = None  # the thread in a call with a level
_block: int | None = None  # the thread in a block
_depth = 0  # of its nested blocks
_lent = False  # to the threads of a backward pass that the one with the lock waits for

_OPEN = (
    "a forward-mode level is open that this call cannot nest in: PyTorch has one for the whole "
    "process. It is a dual_level() around the call, where torch.func.jvp would nest; or another "
    "thread's, whose forward-mode code has to run in `with tangent_ops.fused_forward_ad():`, in "
    "which threads take turns."
)


def in_own_level(function: Callable[[], Result]) -> Result:
    """``function()`` in a new level, outside of ``torch.func``.

    Raises:
        UnsupportedError: a level is open, or another thread stays in a block.
    """
    # Not a context manager: an interrupt may come between any two calls of Python, and one before
    # __exit__ would leave the level open. For the same reason PyTorch's functions in C are called.
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
                # First what Python sees: PyTorch takes a level that it opens meanwhile for broken.
                forward_ad._current_level = -1
                _caller = before
                torch._C._exit_dual_level(level=0)  # pyright: ignore[reportAttributeAccessIssue]


def in_transforms(function: Callable[[], Result]) -> Result:
    """``function()``, which calls ``torch.func.jvp`` inside other transforms of this thread.

    Raises:
        UnsupportedError: a level is open that is not of these transforms, or another thread stays
            in a block.
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
    """``torch.func.functional_call``, while no other thread is in a call of the module's."""
    return in_turn(lambda: torch.func.functional_call(module, dict(parameters), args, kwargs))


def in_turn(function: Callable[[], Result]) -> Result:
    """``function()``, which may open levels, while no other thread is in a call.

    Raises:
        UnsupportedError: another thread stays in a block.
    """
    if is_compiling():  # and compiled code has no lock
        return function()
    with _LOCK:
        _wait_for_block()
        return function()


def alone(function: Callable[[], Result]) -> Result:
    """The same for what opens no level, and so need not wait for blocks.

    A backward pass must not: on a GPU another thread, which may be in one, waits for it.
    """
    if is_compiling() or (_lent and _in_a_backward_pass()):
        return function()
    with _LOCK:
        return function()


def backward(function: Callable[[], Result]) -> Result:
    """``function()``, a backward pass within a call: it may be alone in a thread of its own."""
    global _lent
    before, _lent = _lent, True
    try:
        return function()
    finally:
        _lent = before


def enter_block() -> None:
    """Have the levels to oneself until :func:`leave_block`; blocks nest.

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
    global _block, _depth
    with _LOCK:
        _depth -= 1
        if _depth == 0:
            _block = None
            _BLOCK_ENDS.notify_all()


def is_compiling() -> bool:
    """``torch.compiler.is_compiling()`` in this thread: the flag is the whole process's."""
    return torch.compiler.is_dynamo_compiling() or (
        torch.compiler.is_compiling() and TracingContext.try_get() is not None
    )


def called_elsewhere() -> bool:
    """Whether another thread is in a call with a level, in which this one has no part.

    A thread of PyTorch's that runs a backward pass may have: it counts as the caller's.
    """
    caller = _caller
    return caller is not None and caller != threading.get_ident() and not _in_a_backward_pass()


def _in_a_backward_pass() -> bool:
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]


def _wait_for_block() -> None:
    """With the lock, which others have meanwhile."""
    if _block is None or _block == threading.get_ident():
        return
    if not _BLOCK_ENDS.wait_for(lambda: _block is None, PATIENCE):
        raise UnsupportedError(
            f"another thread has been in `with tangent_ops.fused_forward_ad():` for more than "
            f"{PATIENCE:g} s. PyTorch has one forward-mode level for the whole process, so threads "
            "take turns: enter that context for one forward pass at a time, and do not wait for "
            "other threads in it."
        )


def _wait_for_leaving() -> None:
    """Until a thread that left its level, not this library's, has written so."""
    end = time.monotonic() + 1.0
    while forward_ad._current_level >= 0:
        if time.monotonic() > end:
            raise UnsupportedError(_OPEN)
        time.sleep(0)


def _jvps() -> int:
    """How many ``torch.func.jvp`` this thread is in: its stack is its own, their count is not."""
    return sum(each.key() == TransformType.Jvp for each in get_interpreter_stack() or ())


def _after_fork() -> None:
    """In a child, where the other threads are gone."""
    global _block, _depth
    if _block != threading.get_ident():
        _block, _depth = None, 0
    _LOCK.release()


# A child begins between two calls: no level is open, and every module has its own parameters.
os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_after_fork)
