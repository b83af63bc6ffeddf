"""Nothing that a forward pass keeps in eval mode outlives a call of the linearized model."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import assert_near, exact_jvp, exact_vjp, generator, moved
from torch import Tensor, nn

from tangent_ops import linearize
from tangent_ops.errors import UnsupportedError

X = torch.randn(3, 4, generator=generator(1))


class Keeps(nn.Module):
    """y = x (2 W) by a transposed weight, which a subclass keeps somewhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(4, 4)
        self.make()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.kept()) + self.q.bias


class Attribute(Keeps):
    def make(self):
        self.c = None

    def kept(self):
        if self.c is None:
            self.c = self.q.weight.t() * 2
        return self.c


class Flagged(Attribute):
    def make(self):
        self.ready = False

    def kept(self):
        if not self.ready:
            self.c, self.ready = self.q.weight.t() * 2, True
        return self.c


class Buffer(Attribute):
    def make(self):
        self.register_buffer("c", None, persistent=False)


class Dict(Keeps):
    def make(self):
        self.c = {}

    def kept(self):
        if "w" not in self.c:
            self.c["w"] = (self.q.weight.t() * 2, 1)
        return self.c["w"][0]


class List(Keeps):
    def make(self):
        self.c = []

    def kept(self):
        if not self.c:
            self.c.append(self.q.weight.t() * 2)
        return self.c[0]


class Deque(List):
    def make(self):
        self.c = deque(maxlen=2)


class Object(Keeps):
    def make(self):
        self.c = SimpleNamespace(inner={"w": None})

    def kept(self):
        if self.c.inner["w"] is None:
            self.c.inner["w"] = self.q.weight.t() * 2
        return self.c.inner["w"]


class Plain(Keeps):
    def make(self):
        pass

    def kept(self):
        return self.q.weight.t() * 2


@pytest.mark.parametrize("known", [True, False], ids=["at linearize", "at the first call"])
@pytest.mark.parametrize("kind", [Attribute, Flagged, Buffer, Dict, List, Deque, Object])
def test_kept_tensors_are_put_back(kind, known):
    tangent = moved(linearize(kind(), example=X if known else None))
    exact = exact_jvp(Plain(), tangent.deltas(), X)
    cotangent = torch.randn(3, 4, generator=generator(2))
    exact_grads = exact_vjp(Plain(), list(tangent.deltas()), cotangent, X)
    for call in range(4):
        assert_near(tangent.primal_and_tangent(X), exact)
        grads = torch.autograd.grad(tangent(X), list(tangent.deltas().values()), cotangent)
        assert_near(dict(zip(tangent.deltas(), grads, strict=True)), exact_grads)
        with torch.no_grad():
            if call == 1:
                tangent.anchor(X)  # which keeps a tensor without a tangent
            if call == 2:
                tangent.double().float()
    torch.func.jvp(lambda x: tangent(x), (X,), (X,))  # inside another transform
    assert_near(tangent.primal_and_tangent(X), exact)


def test_what_depends_on_no_weight_stays():
    class Counts(Plain):
        def make(self):
            self.calls, self.grid = 0, {}

        def kept(self):
            self.calls += 1
            self.grid.setdefault(4, torch.arange(4.0))
            return super().kept() * (self.grid[4] > 0)

    tangent = linearize(Counts(), check=False)
    anchor: Any = tangent.anchor
    tangent(X)
    grid = anchor.grid[4]
    tangent(X)
    assert anchor.calls == 2 and anchor.grid[4] is grid


class InPlace(Keeps):
    def make(self):
        self.register_buffer("c", torch.zeros(4, 4))
        self.ready = False

    def kept(self):
        if not self.ready:
            self.c.copy_(self.q.weight.t() * 2)
            self.ready = True
        return self.c


class InPlaceAttribute(InPlace):
    def make(self):
        self.c, self.ready = torch.zeros(4, 4), False


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", [InPlace, InPlaceAttribute])
def test_a_buffer_changed_in_place_is_refused(kind, check):
    tangent = linearize(kind(), check=check)
    with pytest.raises(UnsupportedError, match="changes c in place"):
        tangent(X)


KEPT_ELSEWHERE: dict[int, Tensor] = {}


class Elsewhere(Keeps):
    def make(self):
        pass

    def kept(self):
        return KEPT_ELSEWHERE.setdefault(0, self.q.weight.t() * 2)


class InAClosure(Keeps):
    def make(self):
        memory = {}
        self.remember = lambda make: memory.get(0) if 0 in memory else memory.setdefault(0, make())

    def kept(self):
        return self.remember(lambda: self.q.weight.t() * 2)


@pytest.mark.parametrize("kind", [Elsewhere, InAClosure])
def test_what_is_kept_outside_of_the_model_is_refused(kind):
    KEPT_ELSEWHERE.clear()
    with pytest.raises(UnsupportedError, match=r"q\.weight .*gets lost"):
        linearize(kind(), example=X)
