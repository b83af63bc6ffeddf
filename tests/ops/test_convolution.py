"""The dual convolution against PyTorch's own rule in float64."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from tangent_ops import fused_forward_ad
from tangent_ops.ops.convolution import convolution
from tests.ops import oracle
from tests.ops.oracle import pushforward

PRESENT = [flags for flags in itertools.product([True, False], repeat=3) if any(flags)]
conv2d = functools.partial(convolution, F.conv2d)

# PyTorch's function, input, weight, options.
CASES = {
    "patches": (F.conv2d, (2, 3, 8, 8), (5, 3, 4, 4), {"stride": 4}),
    "padded": (F.conv2d, (2, 4, 7, 6), (6, 4, 3, 3), {"padding": (1, 2), "stride": (2, 1)}),
    "depthwise": (F.conv2d, (2, 4, 7, 7), (4, 1, 3, 3), {"padding": 1, "groups": 4}),
    "dilated": (F.conv2d, (1, 2, 9, 9), (3, 2, 3, 3), {"dilation": 2}),
    "same": (F.conv2d, (1, 2, 6, 6), (3, 2, 3, 3), {"padding": "same"}),
    "unbatched": (F.conv2d, (2, 6, 6), (3, 2, 3, 3), {}),
    "1d": (F.conv1d, (2, 3, 9), (4, 3, 3), {"stride": (2,)}),
    "3d": (F.conv3d, (1, 2, 4, 5, 6), (3, 2, 2, 2, 2), {"stride": 2}),
}


def operands(input, weight, bias=True):
    torch.manual_seed(0)
    shapes = [input, weight] + [weight[:1]] * bias
    return [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("present", PRESENT)
def test_tangent_and_its_gradients(name, present) -> None:
    function, input, weight, options = CASES[name]
    primals, tangents = operands(input, weight)
    leaves = [t.requires_grad_() for t, p in zip(tangents, present, strict=True) if p]
    given = [t if p else None for t, p in zip(tangents, present, strict=True)]
    results = []
    for op in (functools.partial(convolution, function), function):
        output, output_t = pushforward(functools.partial(op, **options), primals, given)
        assert not output.requires_grad  # or the next layer would see a primal that is trained
        results.append((output, output_t, *torch.autograd.grad(output_t.sin().sum(), leaves)))
    for one, right in zip(*results, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype) -> None:
    _, *shapes, options = CASES["patches"]
    primals, tangents = ([x.to(dtype) for x in xs] for xs in operands(*shapes))

    def answer(op, convert=lambda x: x):
        with torch.no_grad():
            return pushforward(
                functools.partial(op, **options), convert(primals), convert(tangents)
            )

    found = answer(conv2d)
    assert all(one.dtype == dtype for one in found)
    oracle.assert_as_good_as(found, answer(F.conv2d, oracle.double), answer(F.conv2d))


def test_no_bias_and_autocast() -> None:
    _, *shapes, options = CASES["padded"]
    primals, tangents = ([x.float() for x in xs] for xs in operands(*shapes, bias=False))
    with torch.no_grad():
        right = pushforward(functools.partial(F.conv2d, **options), primals, tangents)
        found = pushforward(functools.partial(conv2d, **options), primals, tangents)
        torch.testing.assert_close(found, right)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = pushforward(functools.partial(conv2d, **options), primals, tangents)
    for one, exact in zip(cast, right, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), exact, rtol=0.05, atol=0.2)


def test_a_plain_input_costs_two_products() -> None:
    """PyTorch's rule convolves zeros as well: three."""
    _, *shapes, options = CASES["patches"]
    primals, tangents = operands(*shapes)
    counts = []
    for context in (fused_forward_ad(), torch.no_grad()):
        with torch.no_grad(), context, FlopCounterMode(display=False) as counter:
            pushforward(functools.partial(F.conv2d, **options), primals, [None, *tangents[1:]])
        counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as plain:
        F.conv2d(*primals, **options)
    assert counts == [2 * plain.get_total_flops(), 3 * plain.get_total_flops()]


def test_only_primals_are_kept() -> None:
    _, *shapes, options = CASES["padded"]
    primals, tangents = operands(*shapes)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        leaves = [t.requires_grad_() for t in tangents]
        pushforward(functools.partial(conv2d, **options), primals, leaves)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in primals[:2]}


def test_forward_over_reverse_is_pytorchs() -> None:
    """The gradient's tangent needs the dual primals, which an unpacked formula would lose."""
    _, *shapes, options = CASES["padded"]
    primals, tangents = operands(*shapes)
    results = []
    for op in (conv2d, F.conv2d):
        with forward_ad.dual_level():
            dual = [
                forward_ad.make_dual(p.clone().requires_grad_(), t)
                for p, t in zip(primals, tangents, strict=True)
            ]
            grads = torch.autograd.grad(op(*dual, **options).square().sum(), dual)
            results.append([forward_ad.unpack_dual(g).tangent for g in grads])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_inside_transforms() -> None:
    _, *shapes, options = CASES["patches"]
    primals, tangents = operands(*shapes)
    stacks = [torch.stack([t, 2 * t]) for t in tangents]
    results = []
    for op in (conv2d, F.conv2d):
        run = functools.partial(op, **options)
        one = lambda *t, run=run: torch.func.jvp(run, tuple(primals), t)[1]  # noqa: E731
        results.append(torch.func.vmap(one)(*stacks))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
