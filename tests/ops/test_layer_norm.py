"""The dual layer norm against PyTorch's own rules in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tangent_ops.ops.norm import layer_norm
from torch.autograd import forward_ad

from tangent_ops.ops.dual_op import _Dual
from tests.ops import oracle

PRESENT = [flags for flags in itertools.product([True, False], repeat=3) if any(flags)]


def operands(
    lead=(2, 3), shape=(5,), weight=True, bias=True, dtype=torch.float64, seed=0
) -> tuple[list[Any], list[Any]]:
    """Primals (None where the layer has none) and as many tangents."""
    source = torch.Generator().manual_seed(seed)
    shapes = [(*lead, *shape), shape if weight else None, shape if bias else None]

    def draw():
        return [
            None if s is None else torch.randn(s, generator=source, dtype=torch.float64).to(dtype)
            for s in shapes
        ]

    return draw(), draw()


def pushforward(op, primals, tangents, shape=(5,), eps=1e-5) -> tuple[Any, Any]:
    return oracle.pushforward(lambda x, w, b: op(x, shape, w, b, eps), primals, tangents)


def results(op, primals, tangents, shape=(5,), eps=1e-5):
    """Output, tangent, gradients of the tangents, and a second derivative through those."""
    leaves = [t.detach().clone().requires_grad_() for t in tangents if t is not None]
    remaining = iter(leaves)
    given = [None if t is None else next(remaining) for t in tangents]
    output, output_t = pushforward(op, primals, given, shape, eps)
    grads = torch.autograd.grad(output_t.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    return output, output_t, *grads, *second


@pytest.fixture
def own_calls(monkeypatch):
    """Counts the calls that are not left to PyTorch."""
    calls = []
    original = _Dual.forward
    counted = staticmethod(lambda *a: calls.append(a) or original(*a))
    monkeypatch.setattr(_Dual, "forward", counted)
    return calls


@pytest.mark.parametrize(
    "affine, present",
    [
        (affine, present)
        for affine in [(True, True), (True, False), (False, False), (False, True)]
        for present in PRESENT
        if present[0] or any(has and t for has, t in zip(affine, present[1:], strict=True))
    ],
)
def test_any_subset_of_tangents(affine, present, own_calls) -> None:
    primals, tangents = operands(weight=affine[0], bias=affine[1])
    given = [t if p else None for t, p in zip(tangents, present, strict=True)]
    found, right = (results(op, primals, given) for op in (layer_norm, F.layer_norm))
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        pair = pushforward(layer_norm, primals, given)
    torch.testing.assert_close(pair, right[:2], rtol=1e-12, atol=1e-12)
    assert len(own_calls) == (0 if affine == (False, True) else 2)
    assert not pair[0].requires_grad


@settings(max_examples=40, deadline=None)
@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    shape=st.lists(st.integers(2, 5), min_size=1, max_size=2),
    eps=st.sampled_from([1e-6, 0.1]),
    offset=st.sampled_from([0.0, 100.0]),
    flip=st.booleans(),
)
def test_any_shape(lead, shape, eps, offset, flip) -> None:
    primals, tangents = operands(lead, tuple(shape))
    primals[0] = primals[0] + offset
    if flip and len(lead) > 1:  # rows that do not follow one another in memory
        for operands_ in (primals, tangents):
            operands_[0] = operands_[0].transpose(0, 1).contiguous().transpose(0, 1)
    found, right = (results(op, primals, tangents, shape, eps) for op in (layer_norm, F.layer_norm))
    torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-9)


def test_a_constant_row_has_a_derivative() -> None:
    """Its variance is 0, and ε all that is under the root."""
    primals, tangents = operands()
    primals[0].fill_(3.0)
    found, right = (pushforward(op, primals, tangents) for op in (layer_norm, F.layer_norm))
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype) -> None:
    """PyTorch's CPU sums the gradients of weight and bias in 16 bits, so they are here, too."""
    primals, tangents = operands((2, 50), (64,), dtype=dtype)
    (cotangent, *_), _ = operands((2, 50), (64,), dtype=dtype, seed=1)
    found = pushforward(layer_norm, primals, [t.requires_grad_() for t in tangents], (64,))
    with torch.no_grad():
        eager = pushforward(F.layer_norm, primals, tangents, (64,))
        exact = pushforward(F.layer_norm, oracle.double(primals), oracle.double(tangents), (64,))
    assert found[0].dtype == found[1].dtype == dtype
    oracle.assert_as_good_as(found, exact, eager)

    leaves = [p.clone().requires_grad_() for p in primals]
    ordinary = F.layer_norm(leaves[0], (64,), leaves[1], leaves[2])
    grads = torch.autograd.grad(found[1], tangents, cotangent)
    for one, own in zip(grads, torch.autograd.grad(ordinary, leaves, cotangent), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, own)


def test_forward_over_reverse_is_pytorchs(own_calls) -> None:
    primals, tangents = operands()
    answers = []
    for op in (layer_norm, F.layer_norm):
        with forward_ad.dual_level():
            dual = [
                forward_ad.make_dual(p.clone().requires_grad_(), t)
                for p, t in zip(primals, tangents, strict=True)
            ]
            output = op(dual[0], (5,), dual[1], dual[2])
            grads = torch.autograd.grad(output.square().sum(), dual)
            answers.append([forward_ad.unpack_dual(g).tangent for g in grads])
    torch.testing.assert_close(*answers, rtol=1e-12, atol=1e-12)
    assert not own_calls


def test_inside_transforms_and_mixed_dtypes_it_is_pytorchs(own_calls) -> None:
    primals, tangents = operands()
    stacks = [torch.stack([t, 2 * t]) for t in tangents]
    answers = []
    for op in (layer_norm, F.layer_norm):
        call = lambda x, w, b, op=op: op(x, (5,), w, b)  # noqa: E731
        one = lambda *t, call=call: torch.func.jvp(call, tuple(primals), t)[1]  # noqa: E731
        answers.append(torch.func.vmap(one)(*stacks))
    torch.testing.assert_close(*answers, rtol=1e-12, atol=1e-12)

    primals, tangents = operands(dtype=torch.float32)
    primals[0], tangents[0] = primals[0].bfloat16(), tangents[0].bfloat16()
    pairs = [pushforward(op, primals, tangents) for op in (layer_norm, F.layer_norm)]
    assert all(torch.equal(*same) for same in zip(*pairs, strict=True))

    primals, tangents = operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [pushforward(op, primals, tangents) for op in (layer_norm, F.layer_norm)]
    assert all(torch.equal(*same) for same in zip(*pairs, strict=True))
    assert not own_calls


def test_derivatives_of_the_tangent_by_the_input() -> None:
    """Where PyTorch's own are wrong: reverse over forward, and forward over forward."""

    def in_words(x, w, b):
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + b

    primals, tangents = (tuple(some) for some in operands())
    answers = []
    for op in (lambda x, w, b: layer_norm(x, (5,), w, b), in_words):

        def along(*p, op=op):
            return torch.func.jvp(op, p, tangents)[1]

        leaves = [p.clone().requires_grad_() for p in primals]
        tracked = torch.autograd.grad(along(*leaves).sin().sum(), leaves[:2])
        nested = torch.func.grad(lambda *p, f=along: f(*p).sin().sum(), argnums=(0, 1))(*primals)
        answers.append((tracked, nested, torch.func.jvp(along, primals, tangents)[1]))
    torch.testing.assert_close(*answers, rtol=1e-10, atol=1e-11)
