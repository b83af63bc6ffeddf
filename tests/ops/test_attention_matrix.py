"""Every pair of transforms is right or raises a named error, as docs/nestings.md lists for CPUs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.ops import oracle
from tests.ops.backends import backends, device_of
from tests.ops.transforms import CELLS, DEEP, SHAPE, outcome, plain_cell, title, value
from tools.pages.nestings import BACKENDS, acceptable, check

# torch's own: vmap loops where its fast attention has no batching rule; linearize folds constants.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
    # linearize traces with tangents that nobody has set (`new_empty`), and discards the values: if
    # they are huge, interpreted kernels overflow.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


@pytest.mark.parametrize("cell", CELLS, ids=title)
@pytest.mark.parametrize("backend", backends("default", "reference", "triton"))
def test_right_or_raises_by_name(backend, cell) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    found = check(cell, backend, dtype, device_of(backend))
    if backend == "reference" and found not in ("right", "pytorch"):
        assert found == outcome(cell, oracle.math_attention)  # the limit is PyTorch's own


PAIRS = [*itertools.product(DEEP, repeat=2)]
# Under a jvp, compiled code cannot see what is dual in a vmap or grad; Dynamo traces no grad around
# a custom operator, and no jvp of its jvp.
HIDING = [("jvp", "vmap"), ("jvp", "grad")]
NOT_COMPILED = {
    "default": [*HIDING, ("grad", "grad")],  # the last without a tangent, so PyTorch's own
    "triton": [*HIDING, ("jvp", "jvp"), *(pair for pair in PAIRS if "grad" in pair)],
}


@pytest.mark.parametrize("pair", PAIRS, ids=title)
@pytest.mark.parametrize("backend", backends("default", "triton"))
def test_compiled_pairs(backend, pair) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    found = outcome(("compile", *pair), BACKENDS[backend], dtype, device_of(backend))
    assert acceptable(found), found
    assert found == "right" or pair in NOT_COMPILED[backend], found


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=title)
def test_the_default_on_a_gpu(cell) -> None:
    check(cell, "default", torch.float32, "cuda")


@pytest.mark.parametrize("cell", sorted({plain_cell(cell) for cell in CELLS}), ids=title)
def test_the_oracle_agrees_with_attention_spelled_out(cell) -> None:
    def spelled_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (query @ key.mT * query.shape[-1] ** -0.5).exp()
        return weights / weights.sum(-1, keepdim=True) @ value

    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, exact = (value(cell, op, x) for op in (spelled_out, oracle.math_attention))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", [("jvp",), ("autocast", "jvp"), ("jvp", "grad")], ids=title)
def test_a_lost_tangent_is_seen(cell) -> None:
    def of_a_constant_key(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return oracle.math_attention(query, key.detach(), value)

    assert outcome(cell, of_a_constant_key).startswith("wrong")
