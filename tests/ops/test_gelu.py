"""The dual GELU against PyTorch's own rules in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tangent_ops.ops.activation import gelu
from torch.autograd import forward_ad

from tangent_ops.ops.dual_op import _Dual
from tests.ops import oracle

APPROXIMATE = ["none", "tanh"]


def operands(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    primal, tangent = torch.randn(2, 3, 40, 5, generator=source, dtype=torch.float64).unbind()
    primal[0, :3] = torch.tensor([0.0, 1e-30, -1e-30, 8.0, -30.0])
    return primal.to(dtype), tangent.to(dtype)


def pushforward(op, primal, tangent, **options) -> tuple[Any, Any]:
    return oracle.pushforward(lambda x: op(x, **options), [primal], [tangent])


@pytest.fixture
def own_calls(monkeypatch):
    """Counts the calls that are not left to PyTorch."""
    calls = []
    original = _Dual.forward
    counted = staticmethod(lambda *a: calls.append(a) or original(*a))
    monkeypatch.setattr(_Dual, "forward", counted)
    return calls


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_tangent_its_gradient_and_a_second_one(approximate, own_calls) -> None:
    primal, tangent = operands()
    results = []
    for op in (gelu, F.gelu):
        leaf = tangent.clone().requires_grad_()
        output, output_t = pushforward(op, primal, leaf, approximate=approximate)
        assert not output.requires_grad
        (grad,) = torch.autograd.grad(output_t.sin().sum(), leaf, create_graph=True)
        results.append((output, output_t, grad, *torch.autograd.grad(grad.square().sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-14)
    assert len(own_calls) == 1


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype, approximate) -> None:
    def answer(op, convert=lambda x: x):
        primal, tangent = convert(operands(dtype))
        leaf = tangent.requires_grad_()
        pair = pushforward(op, primal, leaf, approximate=approximate)
        return [*pair, *torch.autograd.grad(pair[1], leaf, primal)]  # primal: any cotangent does

    found = answer(gelu)
    assert all(one.dtype == dtype for one in found)
    oracle.assert_as_good_as(found, answer(F.gelu, oracle.double), answer(F.gelu))


def test_forward_over_reverse_and_transforms_are_pytorchs(own_calls) -> None:
    primal, tangent = operands()
    answers = []
    for op in (gelu, F.gelu):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(primal.clone().requires_grad_(), tangent)
            (grad,) = torch.autograd.grad(op(dual).square().sum(), dual)
            hessian = forward_ad.unpack_dual(grad).tangent
        one = lambda t, op=op: torch.func.jvp(op, (primal,), (t,))[1]  # noqa: E731
        answers.append((hessian, torch.func.vmap(one)(torch.stack([tangent, primal]))))
    torch.testing.assert_close(*answers, rtol=1e-13, atol=1e-14)
    assert not own_calls
