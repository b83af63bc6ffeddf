"""Levels that a call must share, and the state after errors, interrupts and forks."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from small_models import generator, images, moved, vit
from threaded import (
    HANGS,
    Waiting,
    again_until,
    busy_switching,  # noqa: F401 - around every test
    elsewhere,
    for_seconds,
    run,
    small,
)
from torch import Tensor, nn
from torch._functorch.eager_transforms import jvp_increment_nesting
from torch.autograd import forward_ad

from tangent_ops import fused_forward_ad, linearize
from tangent_ops.errors import UnsupportedError
from tangent_ops.ops import levels
from tangent_ops.ops.backend import in_forward_ad


@contextlib.contextmanager
def in_a_jvp() -> Iterator[None]:
    """A block inside a torch.func.jvp of the thread."""
    with jvp_increment_nesting(), forward_ad.dual_level():
        yield


@pytest.mark.parametrize("level", [forward_ad.dual_level, in_a_jvp])
def test_a_level_of_another_thread_is_refused(level) -> None:
    tangent, x, _, call = small()
    x_t = torch.ones_like(x)
    with elsewhere(level):
        with pytest.raises(UnsupportedError, match=r"another\s+thread's.*fused_forward_ad"):
            tangent(x)
        with pytest.raises(UnsupportedError, match=r"another\s+thread's"):
            torch.func.vmap(tangent)(x)
        if level is in_a_jvp:  # PyTorch would let these share its level
            with pytest.raises(UnsupportedError, match=r"another\s+thread's"):
                torch.func.jvp(tangent, (x,), (x_t,))
            with pytest.raises(UnsupportedError, match=r"another\s+thread's"), fused_forward_ad():
                pass
    call()


@pytest.mark.parametrize("leaves", [True, False])
def test_a_thread_in_the_middle_of_leaving(leaves: bool) -> None:
    """PyTorch closes a level first and updates ``_current_level`` second."""

    def opened() -> bool:
        time.sleep(0.2)
        return in_forward_ad()

    forward_ad._current_level = 0
    timer = threading.Timer(0.1 if leaves else 2.0, setattr, (forward_ad, "_current_level", -1))
    timer.start()
    if leaves:
        assert levels.in_own_level(opened)
    else:
        with pytest.raises(UnsupportedError, match="is open"):
            levels.in_own_level(opened)
    timer.join(HANGS)


def test_levels_of_the_same_thread() -> None:
    tangent, x, *_ = small()
    with forward_ad.dual_level():
        with pytest.raises(UnsupportedError, match=r"dual_level\(\) around the call"):
            tangent(x)
        assert forward_ad._current_level == 0
        assert forward_ad.unpack_dual(forward_ad.make_dual(x, x)).tangent is not None
    outer = linearize(Around(tangent))
    with pytest.raises(UnsupportedError, match=r"cannot nest"):
        outer(x)


class Around(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_long_block_of_another_thread(monkeypatch) -> None:
    monkeypatch.setattr(levels, "PATIENCE", 0.1)
    *_, call = small()
    with elsewhere(fused_forward_ad):
        for waits in (call, lambda: fused_forward_ad().__enter__()):
            with pytest.raises(UnsupportedError, match=r"more than 0\.1 s.*one forward pass"):
                waits()
    call()


def test_a_backward_pass_does_not_wait_for_blocks() -> None:
    """On a GPU it runs in another thread, for which the thread in the block waits."""
    tangent = moved(linearize(vit(depth=2)))
    tangent.set_grad_checkpointing()
    output = tangent(images()).sum()
    with elsewhere(fused_forward_ad):
        assert run(output.backward) == []


def test_a_backward_pass_of_the_check_is_part_of_it(monkeypatch) -> None:
    """On a GPU it runs in another thread, for which the check waits while it holds the lock."""
    model, grad, passes = vit(depth=2), torch.autograd.grad, []
    model.set_grad_checkpointing()

    def as_on_a_gpu(*args, **options):
        if threading.current_thread() is not threading.main_thread():
            return grad(*args, **options)
        assert run(lambda: passes.append(grad(*args, **options))) == []
        return passes[-1]

    monkeypatch.setattr(torch.autograd, "grad", as_on_a_gpu)
    linearize(model, example=images())
    assert len(passes) == 2


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_errors_leave_nothing(error: type[BaseException]) -> None:
    def fail() -> None:
        if failing:
            raise error

    failing = False
    tangent = linearize(Waiting(fail))
    failing = True
    x = torch.ones(2, 6)
    for call in (tangent, torch.func.vmap(tangent), torch.func.grad(lambda x: tangent(x).sum())):
        with pytest.raises(error):
            call(x)
        assert forward_ad._current_level == -1
        assert run(lambda: small()[-1]()) == []
    with pytest.raises(error), fused_forward_ad():
        fail()


def test_a_block_that_dynamo_leaves_was_not_entered() -> None:
    def call(x: Tensor) -> Tensor:
        with fused_forward_ad():
            return torch.nn.functional.linear(x, x[:, :3])  # shapes that do not fit

    torch._dynamo.reset()
    with pytest.raises(RuntimeError):
        torch.compile(call, backend="eager")(torch.ones(4, 5))
    assert (levels._block, levels._depth) == (None, 0)


def test_interrupts_at_any_moment_leave_no_level() -> None:
    _, x, _, call = small()
    me, interrupts = threading.main_thread().ident, 0
    assert me == threading.get_ident()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        stop, delay = for_seconds(1), generator()
        while not stop():
            try:
                wait = 1e-4 + 2e-3 * float(torch.rand((), generator=delay))
                signal.setitimer(signal.ITIMER_REAL, wait)
                levels.in_own_level(lambda: forward_ad.make_dual(x, x).sin())
                while True:
                    levels.in_own_level(lambda: None)
            except KeyboardInterrupt:
                interrupts += 1
            assert forward_ad._current_level == -1
            assert run(lambda: levels.in_own_level(lambda: None)) == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 10
    call()


@pytest.mark.parametrize("other", ["calls", "block"])
def test_a_forked_child_calls(other: str) -> None:
    *_, call = small()
    done = threading.Event()
    calls = threading.Thread(target=again_until(done.is_set, call), daemon=True)
    context = elsewhere(fused_forward_ad) if other == "block" else contextlib.nullcontext()
    try:
        with context:
            if other == "calls":
                calls.start()
            for _ in range(5):
                child = os.fork()
                if child == 0:
                    signal.alarm(20)
                    try:
                        call()
                        os._exit(0)
                    finally:
                        os._exit(1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        done.set()
        if other == "calls":
            calls.join(HANGS)
