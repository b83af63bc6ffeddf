"""Unmasked attention in a plain dual level: in parts, in place, with its own adjoint."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tangent_ops
from tangent_ops.functional import _attention_eager
from tests.ops import oracle

PRESENT = [flags for flags in itertools.product([True, False], repeat=3) if any(flags)]


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # which also fills torch.empty
    assert torch.ones(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 40, 2**18], ids=lambda size: f"{size}-scores")
def cached(request, monkeypatch):
    """Scores per part: an image each, some, or the whole batch."""
    monkeypatch.setattr(_attention_eager, "_CACHED", request.param)


def draw(shapes, dtype=torch.float64, seed=0):
    """Tensors whose heads lie beside each other in memory, as a ViT's do."""
    source = torch.Generator().manual_seed(seed)
    memory = [(b, n, h, d) for b, h, n, d in shapes]
    return [
        torch.randn(shape, generator=source, dtype=torch.float64).to(dtype).transpose(1, 2)
        for shape in memory
    ]


def run(primals, tangents, scale=None) -> tuple[Any, Any]:
    attention = functools.partial(tangent_ops.scaled_dot_product_attention, scale=scale)
    return oracle.pushforward(attention, primals, tangents)


def check(shapes, present, dtype=torch.float64, scale=None) -> None:
    primals, tangents = draw(shapes, dtype), draw(shapes, dtype, seed=1)
    given = [t.requires_grad_() if p else None for t, p in zip(tangents, present, strict=True)]
    leaves = [t for t in given if t is not None]
    (cotangent,) = draw([(*shapes[0][:3], shapes[2][3])], dtype, seed=2)

    pair = run(primals, given, scale)
    found = [*pair, *torch.autograd.grad(pair[1], leaves, cotangent)]
    assert all(one.dtype == dtype for one in found)
    assert not pair[0].requires_grad
    with torch.no_grad():
        for one, same in zip(run(primals, given, scale), pair, strict=True):
            assert torch.equal(one, same)

    def answer(convert):
        primal, tangent, grad = convert(primals), convert(given), convert(cotangent)
        with torch.no_grad():
            pair = oracle.attention_jvp(primal, tangent, scale=scale)
            grads = oracle.attention_vjp(primal, grad, scale=scale)
        return [*pair, *(g for g, p in zip(grads, present, strict=True) if p)]

    exact = answer(oracle.double)
    if dtype == torch.float64:
        for one, right in zip(found, exact, strict=True):
            torch.testing.assert_close(one, right, rtol=1e-11, atol=1e-12)
    else:
        oracle.assert_as_good_as(found, exact, answer(lambda x: x))


@pytest.mark.parametrize("present", PRESENT)
def test_any_subset_of_tangents(present, cached) -> None:
    check([(5, 2, 3, 4), (5, 2, 6, 4), (5, 2, 6, 7)], present)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    rows=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    scale=st.sampled_from([None, 0.3, -1.0]),
    scores=st.integers(1, 200),
)
def test_any_shape(batch, heads, rows, dims, scale, scores) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_attention_eager, "_CACHED", scores)
        n, m = rows
        shapes = [
            (batch, heads, n, dims[0]),
            (batch, heads, m, dims[0]),
            (batch, heads, m, dims[1]),
        ]
        check(shapes, (True, True, True), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype, cached) -> None:
    check([(3, 2, 50, 16)] * 3, (True, True, True), dtype)


def test_autocast_computes_as_without_it_on_operands_cast_before() -> None:
    shapes = [(3, 2, 5, 16)] * 3
    primals, tangents = draw(shapes, torch.float32), draw(shapes, torch.float32, seed=1)
    (cotangent,) = draw(shapes[:1], torch.bfloat16, seed=2)
    results = []
    for enabled in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in tangents]
        cast = (
            [leaves, primals]
            if enabled
            else [[x.bfloat16() for x in xs] for xs in (leaves, primals)]
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            pair = run(cast[1], cast[0])
        results.append([*pair, *torch.autograd.grad(pair[1], leaves, cotangent)])
    for one, same in zip(*results, strict=True):
        assert torch.equal(one, same)


def test_an_empty_batch() -> None:
    output, output_t = run(*(draw([(0, 2, 3, 4)] * 3) for _ in range(2)))
    assert output.shape == output_t.shape == (0, 2, 3, 4)


def test_fewer_dimensions_than_the_query_broadcast() -> None:
    """Their leading two are not the batch and the heads, even if the numbers agree."""
    shapes = [(2, 2, 5, 4), (2, 2, 4), (2, 2, 4)]
    primals, tangents = ([torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(2))
    lifted = [[xs[0], *(x.expand(2, *x.shape) for x in xs[1:])] for xs in (primals, tangents)]
    with torch.no_grad():
        exact = oracle.attention_jvp(lifted[0], [t.contiguous() for t in lifted[1]])
    for one, right in zip(run(primals, tangents), exact, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-11, atol=1e-12)


def test_heads_merge_without_a_copy() -> None:
    pair = run(draw([(2, 3, 5, 4)] * 3), draw([(2, 3, 5, 4)] * 3, seed=1))
    assert all(one.transpose(1, 2).is_contiguous() for one in pair)
