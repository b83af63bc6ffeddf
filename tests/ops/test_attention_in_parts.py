"""Attention in a plain dual level: a block at a time, in place, with its own adjoint."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tangent_ops
from tangent_ops.ops.attention import eager
from tests.ops import oracle

PRESENT = [flags for flags in itertools.product([True, False], repeat=3) if any(flags)]


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    with oracle.poison():
        yield


@pytest.fixture(
    params=[(1, 1), (4, 2), (40, 3), (2**18, 128)], ids=lambda size: f"{size[0]}-scores"
)
def blocks(request, monkeypatch):
    """Scores of a block: a row or two, a head or two, an image or two, or the whole batch."""
    set_blocks(monkeypatch, *request.param)


def set_blocks(patch, cached, causal_rows) -> None:
    patch.setattr(eager, "_CACHED", cached)
    patch.setattr(eager, "_CAUSAL_ROWS", causal_rows)
    patch.setattr(eager, "_FEWEST_ROWS", 1)
    # One thread's share: two heads at least.
    patch.setattr(torch, "get_num_threads", lambda: 1)


def draw(shapes, dtype=torch.float64, seed=0):
    """Tensors whose heads lie beside each other in memory, as a ViT's do."""
    source = torch.Generator().manual_seed(seed)
    memory = [(b, n, h, d) for b, h, n, d in shapes]
    return [
        torch.randn(shape, generator=source, dtype=torch.float64).to(dtype).transpose(1, 2)
        for shape in memory
    ]


def run(primals, tangents, **options) -> tuple[Any, Any]:
    attention = functools.partial(tangent_ops.scaled_dot_product_attention, **options)
    return oracle.pushforward(attention, primals, tangents)


def check(shapes, present, dtype=torch.float64, **options) -> None:
    primals, tangents = draw(shapes, dtype), draw(shapes, dtype, seed=1)
    given = [t.requires_grad_() if p else None for t, p in zip(tangents, present, strict=True)]
    leaves = [t for t in given if t is not None]
    (cotangent,) = draw([(*shapes[0][:3], shapes[2][3])], dtype, seed=2)

    pair = run(primals, given, **options)
    found = [*pair, *torch.autograd.grad(pair[1], leaves, cotangent)]
    assert all(one.dtype == dtype for one in found)
    assert not pair[0].requires_grad
    with torch.no_grad():
        for one, same in zip(run(primals, given, **options), pair, strict=True):
            assert torch.equal(one, same)

    def answer(convert):
        primal, tangent, grad = convert(primals), convert(given), convert(cotangent)
        with torch.no_grad():
            pair = oracle.attention_jvp(primal, tangent, **options)
            grads = oracle.attention_vjp(primal, grad, **options)
        return [*pair, *(g for g, p in zip(grads, present, strict=True) if p)]

    exact = answer(oracle.double)
    if dtype == torch.float64:
        for one, right in zip(found, exact, strict=True):
            torch.testing.assert_close(one, right, rtol=1e-11, atol=1e-12)
    else:
        oracle.assert_as_good_as(found, exact, answer(lambda x: x))


@pytest.mark.parametrize("present", PRESENT)
@pytest.mark.parametrize("is_causal", [False, True])
def test_any_subset_of_tangents(present, is_causal, blocks) -> None:
    check([(5, 2, 3, 4), (5, 2, 6, 4), (5, 2, 6, 7)], present, is_causal=is_causal)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    rows=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    scale=st.sampled_from([None, 0.3, -1.0]),
    is_causal=st.booleans(),
    cached=st.integers(1, 400),
    causal_rows=st.integers(1, 9),
)
def test_any_shape(batch, heads, rows, dims, scale, is_causal, cached, causal_rows) -> None:
    with pytest.MonkeyPatch.context() as patch:
        set_blocks(patch, cached, causal_rows)
        n, m = rows
        shapes = [
            (batch, heads, n, dims[0]),
            (batch, heads, m, dims[0]),
            (batch, heads, m, dims[1]),
        ]
        check(shapes, (True, True, True), scale=scale, is_causal=is_causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_low_precision(dtype, is_causal, blocks) -> None:
    check([(3, 2, 50, 16)] * 3, (True, True, True), dtype, is_causal=is_causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "keys"), [(300, 300), (300, 140), (140, 300)])
def test_causal_blocks_as_they_are(dtype, rows, keys) -> None:
    shapes = [(2, 3, rows, 8), (2, 3, keys, 8), (2, 3, keys, 8)]
    check(shapes, (True, True, True), dtype, is_causal=True)


def test_sums_over_blocks_are_rounded_once(blocks) -> None:
    primals, tangents = (draw([(2, 3, 40, 8)] * 3, torch.bfloat16, seed) for seed in (0, 1))
    (cotangent,) = draw([(2, 3, 40, 8)], torch.bfloat16, seed=2)
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        operands = [[x.to(dtype) for x in xs] for xs in (primals, tangents)]
        moving = operands[1][2].requires_grad_()
        _, output_t = run(*operands, is_causal=True)
        grads += torch.autograd.grad(output_t, moving, cotangent.to(dtype))
    assert torch.equal(grads[0], grads[1].bfloat16())


def test_blocks_cover_every_score_once(blocks) -> None:
    query, key = torch.empty(3, 5, 7, 2), torch.empty(3, 5, 11, 2)
    for is_causal in (False, True):
        seen = torch.zeros(3, 5, 7, 11)
        for (images, heads, rows), keys, start in eager._blocks(query, key, is_causal):
            assert keys[:2] == (images, heads) and start == (rows.start if is_causal else None)
            assert (
                not is_causal or keys[2].stop <= rows.stop
            )  # masked scores in the diagonal block alone
            seen[images, heads, rows, keys[2]] += 1
        assert seen.max() == 1
        assert seen.tril().equal(torch.ones_like(seen).tril())
        assert is_causal or seen.min() == 1


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


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4)])
def test_empty_batches(shape) -> None:
    output, output_t = run(*(draw([shape] * 3) for _ in range(2)))
    assert output.shape == output_t.shape == shape


def test_fewer_dimensions_than_the_query_broadcast() -> None:
    """Their first two dimensions are not batch and heads, even where the sizes agree."""
    shapes = [(2, 2, 5, 4), (2, 2, 4), (2, 2, 4)]
    primals, tangents = ([torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(2))
    lifted = [[xs[0], *(x.expand(2, *x.shape) for x in xs[1:])] for xs in (primals, tangents)]
    with torch.no_grad():
        exact = oracle.attention_jvp(lifted[0], [t.contiguous() for t in lifted[1]])
    for one, right in zip(run(primals, tangents), exact, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("present", PRESENT)
def test_heads_merge_without_a_copy(present, dtype) -> None:
    primals, tangents = (draw([(2, 3, 5, 4)] * 3, dtype, seed) for seed in (0, 1))
    given = [t if here else None for t, here in zip(tangents, present, strict=True)]
    assert all(one.transpose(1, 2).is_contiguous() for one in run(primals, given))
