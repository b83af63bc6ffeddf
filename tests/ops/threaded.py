"""Shared by the tests of threads: small models, and threads held at a known place."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from small_models import assert_near, exact_jvp, generator, moved
from torch import Tensor, nn
from torch.autograd import forward_ad

from tangent_ops import LinearizedModel, linearize

HANGS = 60.0  # seconds; no thread here takes that long


@pytest.fixture(autouse=True)
def busy_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
    assert forward_ad._current_level == -1
    assert run(lambda: small()[-1]()) == []  # no lock is left behind, nor a level


def calling(tangent: LinearizedModel, x: Tensor, right: tuple[Tensor, Tensor]):
    """A call without gradients that compares primal and tangent with ``right``."""

    def call() -> None:
        with torch.no_grad():
            assert_near(tangent.primal_and_tangent(x), right)

    return call


def small(
    seed: int = 0,
) -> tuple[LinearizedModel, Tensor, tuple[Tensor, Tensor], Callable[[], None]]:
    """A model, an input, its exact primal and tangent in float64, and their `calling`."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    tangent = moved(linearize(model), seed, scale=1.0)
    x = torch.randn(2, 6, generator=generator(seed))
    right = exact_jvp(model, tangent.deltas(), x)
    return tangent, x, right, calling(tangent, x, right)


def run(*functions: Callable[[], object]) -> list[BaseException]:
    """Runs each function in a thread of its own; returns what they raised."""
    raised: list[BaseException] = []

    def guarded(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANGS)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return raised


def again_until(stop: Callable[[], bool], function: Callable[[], object]) -> Callable[[], None]:
    def repeated() -> None:
        while not stop():
            function()

    return repeated


def run_for_a_second(*functions: Callable[[], None]) -> None:
    """Calls each function again and again, in a thread of its own; none raises."""
    stop = for_seconds(1)
    assert run(*(again_until(stop, function) for function in functions)) == []


def for_seconds(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@contextlib.contextmanager
def held(stay: Callable[[Callable[[], object]], object]) -> Iterator[None]:
    """With another thread in ``stay(wait)``, which calls ``wait`` once."""
    inside, done = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert done.wait(HANGS)

    thread = threading.Thread(target=stay, args=(wait,), daemon=True)
    thread.start()
    assert inside.wait(HANGS)
    try:
        yield
    finally:
        done.set()
        thread.join(HANGS)


def elsewhere(context: Callable[[], contextlib.AbstractContextManager]):
    """With another thread inside of that context."""

    def stay(wait: Callable[[], object]) -> None:
        with context():
            wait()

    return held(stay)


class Waiting(nn.Module):
    """Calls a function in the middle of its forward pass."""

    def __init__(self, function: Callable[[], object]):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.function = [function]  # not copied with the module

    def __deepcopy__(self, memo):
        copy = Waiting(self.function[0])
        copy.linear.load_state_dict(self.linear.state_dict())
        return copy

    def forward(self, x: Tensor) -> Tensor:
        output = self.linear(x)
        self.function[0]()
        return output


def linearized_call_elsewhere() -> contextlib.AbstractContextManager[None]:
    """With another thread in the middle of a linearized call."""
    return held(lambda wait: linearize(Waiting(wait), check=False)(torch.ones(2, 6)))
