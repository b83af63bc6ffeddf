"""The dual affine map against PyTorch's own rule in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from tangent_ops.ops.linear import linear
from tests.ops import oracle
from tests.ops.oracle import pushforward

PRESENT = [flags for flags in itertools.product([True, False], repeat=3) if any(flags)]


def operands(lead=(2, 3), bias=True):
    torch.manual_seed(0)
    shapes = [(*lead, 5), (4, 5)] + [(4,)] * bias
    return [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2)]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("present", PRESENT)
def test_any_subset_of_tangents(lead, present) -> None:
    primals, tangents = operands(lead)
    given = [t if p else None for t, p in zip(tangents, present, strict=True)]
    with torch.no_grad():
        found, right = (pushforward(op, primals, given) for op in (linear, F.linear))
    torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("present", PRESENT)
def test_gradients_of_the_tangents(lead, present) -> None:
    primals, tangents = operands(lead)
    leaves = [t.requires_grad_() for t, p in zip(tangents, present, strict=True) if p]
    given = [t if p else None for t, p in zip(tangents, present, strict=True)]
    results = []
    for op in (linear, F.linear):
        output, output_t = pushforward(op, primals, given)
        assert not output.requires_grad  # or the next layer would see a primal that is trained
        results.append((output, output_t, *torch.autograd.grad(output_t.sin().sum(), leaves)))
    for one, right in zip(*results, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype) -> None:
    source = torch.Generator().manual_seed(0)
    shapes = [(2, 9, 32), (16, 32), (16,)]
    primals, tangents = (
        [torch.randn(shape, generator=source).to(dtype) for shape in shapes] for _ in range(2)
    )
    cotangent = torch.randn(2, 9, 16, generator=source).to(dtype)

    def answer(op, convert=lambda x: x):
        leaves = [t.clone().requires_grad_() for t in convert(tangents)]
        pair = pushforward(op, convert(primals), leaves)
        return [*pair, *torch.autograd.grad(pair[1], leaves, convert(cotangent))]

    found = answer(linear)
    assert all(one.dtype == dtype for one in found)
    oracle.assert_as_good_as(found, answer(F.linear, oracle.double), answer(F.linear))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 2, 3), (2, 3, 0)])
def test_without_rows_or_columns(shape) -> None:
    primals = [torch.ones(shape), torch.ones(4, shape[-1]), torch.ones(4)]
    results = []
    for op in (linear, F.linear):
        leaves = [p.clone().requires_grad_() for p in primals]
        pair = pushforward(op, primals, leaves)
        results.append([*pair, *torch.autograd.grad(pair[1].sum(), leaves)])
    torch.testing.assert_close(*results)


def test_no_bias() -> None:
    primals, tangents = operands(bias=False)
    with torch.no_grad():
        found, right = (pushforward(op, primals, tangents) for op in (linear, F.linear))
    torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-13)


def test_forward_over_reverse_is_pytorchs() -> None:
    """The gradient's tangent needs the dual primals, which an unpacked formula would lose."""
    primals, tangents = operands()
    results = []
    for op in (linear, F.linear):
        with forward_ad.dual_level():
            dual = [
                forward_ad.make_dual(p.clone().requires_grad_(), t)
                for p, t in zip(primals, tangents, strict=True)
            ]
            grads = torch.autograd.grad(op(*dual).square().sum(), dual)
            results.append([forward_ad.unpack_dual(g).tangent for g in grads])
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


def test_inside_transforms() -> None:
    primals, tangents = operands()
    stacks = [torch.stack([t, 2 * t]) for t in tangents]
    results = []
    for op in (linear, F.linear):
        one = lambda *t, op=op: torch.func.jvp(op, tuple(primals), t)[1]  # noqa: E731
        results.append(torch.func.vmap(one)(*stacks))
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


def test_autocast() -> None:
    primals, tangents = ([x.float() for x in xs] for xs in operands())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output, output_t = pushforward(linear, primals, tangents)
    assert output is not None and output_t is not None
    assert output.dtype == output_t.dtype == torch.bfloat16
    _, exact = pushforward(F.linear, primals, tangents)
    torch.testing.assert_close(output_t.float(), exact, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    "present", [(True, True, True), (False, True, False), (True, False, False)]
)
def test_a_model_may_change_the_output_in_place(present) -> None:
    primals, tangents = operands((2, 3))
    given = [t.requires_grad_() if p else None for t, p in zip(tangents, present, strict=True)]

    def shifted(op):
        return pushforward(lambda *operands: op(*operands).mul_(2.0).add_(1.0), primals, given)

    torch.testing.assert_close(shifted(linear), shifted(F.linear), rtol=1e-13, atol=1e-13)
