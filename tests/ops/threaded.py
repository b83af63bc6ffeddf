"""What tests of threads share: small models, and threads that are known to be somewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from small_models import (
    exact_jvp,
    generator,
    moved,
)
from torch import Tensor, nn
from torch.autograd import forward_ad

from tangent_ops import (
    LinearizedModel,
    linearize,
)

HANGS = 60.0  # seconds that no thread here takes


@pytest.fixture(autouse=True)
def busy_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
    assert forward_ad._current_level == -1
    call = run(lambda: small()[0](small()[1]))  # no lock is left behind, nor a level
    assert call == []


def small(seed: int = 0) -> tuple[LinearizedModel, Tensor, Tensor, Tensor]:
    """A model, an input, and what its primal and tangent are, in float64."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    tangent = moved(linearize(model), seed, scale=1.0)
    x = torch.randn(2, 6, generator=generator(seed))
    return tangent, x, *exact_jvp(model, tangent.deltas(), x)


def run(*functions: Callable[[], object]) -> list[BaseException]:
    """Each in a thread of its own; what they raised."""
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


def for_seconds(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@contextlib.contextmanager
def elsewhere(context: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
    """With another thread inside of that context."""
    inside, done = threading.Event(), threading.Event()

    def stay() -> None:
        with context():
            inside.set()
            assert done.wait(HANGS)

    thread = threading.Thread(target=stay, daemon=True)
    thread.start()
    assert inside.wait(HANGS)
    try:
        yield
    finally:
        done.set()
        thread.join(HANGS)


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


@contextlib.contextmanager
def linearized_call_elsewhere() -> Iterator[None]:
    """With another thread in the middle of a linearized call."""
    inside, done = threading.Event(), threading.Event()
    tangent = linearize(Waiting(lambda: (inside.set(), done.wait(HANGS))), check=False)
    thread = threading.Thread(target=lambda: tangent(torch.ones(2, 6)), daemon=True)
    thread.start()
    assert inside.wait(HANGS)
    try:
        yield
    finally:
        done.set()
        thread.join(HANGS)
