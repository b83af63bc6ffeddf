"""Layer norm of rows far from 0 or constant, in mixed dtypes, with 16-bit sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tangent_ops.ops.norm import layer_norm, native_layer_norm
from tests.ops import oracle
from tests.ops.contract import check
from tests.ops.dual_ops import OPS, norm

OP = OPS["layer_norm"]


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rows_far_from_zero(eps) -> None:
    """Centring loses two digits of sixteen, and x̂ carries that into all results."""
    primals, tangents = OP.draw((2, 3), 5)
    op = OP._replace(words=lambda x, w, b: norm(x - 100.0, w, b, eps=eps))
    shifted = [primals[0] + 100.0, *primals[1:]]
    ours = lambda x, w, b: layer_norm(x, (5,), w, b, eps)  # noqa: E731
    check(op, ours, shifted, tangents, tracked=False, rtol=1e-8, atol=1e-9)


def test_a_constant_row_has_a_derivative() -> None:
    """Its variance is 0: only ε is left under the root."""
    primals, tangents = OP.draw((2, 3), 5)
    primals[0].fill_(3.0)
    check(OP, OP.ours, primals, tangents, tracked=False, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_tangents_are_the_ordinary_ones_bit_for_bit(dtype) -> None:
    """PyTorch's CPU sums the gradients of weight and bias in 16 bits, so they are here, too."""
    primals, tangents = OP.draw((2, 50), 64, dtype=dtype)
    cotangent = OP.draw((2, 50), 64, seed=1, dtype=dtype)[0][0]
    tangents = [t.requires_grad_() for t in tangents]
    output_t = oracle.pushforward(OP.ours, primals, tangents)[1]
    leaves = [p.clone().requires_grad_() for p in primals]
    ordinary = torch.autograd.grad(OP.pytorchs(*leaves), leaves, cotangent)
    for one, own in zip(torch.autograd.grad(output_t, tangents, cotangent), ordinary, strict=True):
        assert torch.equal(one, own)


@pytest.mark.parametrize("native", [False, True])
def test_second_derivatives_of_the_tangent_by_a_bias_without_a_weight(native) -> None:
    """PyTorch's own second derivatives are wrong without an error."""
    x, bias, bias_t = torch.randn(2, 3, 5).double(), *torch.randn(2, 5).double()

    def second(norm):
        leaf = bias.clone().requires_grad_()
        _, output_t = torch.func.jvp(lambda b: norm(b).square(), (leaf,), (bias_t,))
        (grad,) = torch.autograd.grad(output_t.sin().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.sin().sum(), leaf)

    def ours(b):
        if native:
            return native_layer_norm(x, (5,), None, b, 1e-5)[0]
        return layer_norm(x, (5,), None, b)

    right = second(lambda b: F.layer_norm(x, (5,)) + b)
    torch.testing.assert_close(second(ours), right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_dtypes_are_pytorchs(autocast) -> None:
    primals, tangents = OP.draw((2, 3), 5, dtype=torch.float32)
    if not autocast:
        primals[0], tangents[0] = primals[0].bfloat16(), tangents[0].bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pairs = [
            oracle.pushforward(lambda x, w, b, f=f: f(x, (5,), w, b), primals, tangents)
            for f in (layer_norm, F.layer_norm)
        ]
    assert all(torch.equal(*same) for same in zip(*pairs, strict=True))
