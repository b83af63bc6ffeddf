"""torch.utils.checkpoint and forward mode: right around the context, refused within it."""

from __future__ import annotations

import pytest
import torch
from small_models import generator
from torch import nn
from torch.autograd import forward_ad
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint

from tangent_ops import fused_forward_ad
from tangent_ops.errors import UnsupportedError

OLD = hasattr(checkpoints, "_NoopSaveInputs")  # PyTorch 2.11

X, V = (torch.randn(3, 4, generator=generator(seed)).double() for seed in (1, 2))
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.utils.checkpoint:UserWarning", "ignore:None of the inputs:UserWarning"
)


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("how", ["func.jvp", "dual level"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_within_a_level_of_the_caller(how, reentrant):
    model = layer()

    def call(x):
        return checkpoint(model, x, use_reentrant=reentrant)

    with fused_forward_ad(), pytest.raises((UnsupportedError, RuntimeError)) as raised:
        if how == "func.jvp":
            torch.func.jvp(call, (X,), (V,))
        else:
            with forward_ad.dual_level():
                call(forward_ad.make_dual(X, V))
    # Where a checkpoint is a Function without a jvp, PyTorch itself refuses dual operands.
    refused_by_torch = (reentrant or OLD) and not isinstance(raised.value, UnsupportedError)
    assert refused_by_torch or "within fused_forward_ad" in str(raised.value)
    assert forward_ad._current_level == -1 and torch.is_grad_enabled()


def test_a_reentrant_one_without_a_dual_operand():
    """PyTorch drops the tangent of the weights without an error."""
    model = layer()
    with fused_forward_ad(), forward_ad.dual_level():
        weights = {n: forward_ad.make_dual(p, p.clone()) for n, p in model.named_parameters()}

        def call(x):
            return torch.func.functional_call(model, weights, (x,))

        with pytest.raises(UnsupportedError, match="within fused_forward_ad"):
            checkpoint(call, X, use_reentrant=True)
        call(X)  # later calls work


def tangent(x: torch.Tensor) -> torch.Tensor:
    return torch.func.jvp(layer(), (x,), (V,))[1]


def test_around_the_context():
    """The level is opened anew when the function is repeated."""

    def within(x):
        with fused_forward_ad():
            return tangent(x)

    x = X.clone().requires_grad_()
    exact = torch.autograd.grad(tangent(x).sum(), x)[0]
    found = torch.autograd.grad(checkpoint(within, x, use_reentrant=False).sum(), x)[0]
    torch.testing.assert_close(found, exact)
    loss = checkpoint(within, x, use_reentrant=True).sum()
    loss.backward()
    torch.testing.assert_close(x.grad, exact)


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("level", ["func.jvp", "dual level"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_around_the_level_alone(reentrant, level, tracked):
    """A repetition, or a level within a reentrant checkpoint, would go unnoticed."""

    def in_a_dual_level(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer()(forward_ad.make_dual(x, V))).tangent

    x = X.clone().requires_grad_(tracked)
    call = tangent if level == "func.jvp" else in_a_dual_level
    with fused_forward_ad():
        with pytest.raises(UnsupportedError, match="inside the function"):
            checkpoint(call, x, use_reentrant=reentrant)
        torch.testing.assert_close(tangent(x), torch.func.jvp(layer(), (x,), (V,))[1])


@pytest.mark.skipif(OLD, reason="this PyTorch refuses dual operands of every checkpoint")
def test_without_gradients_a_checkpoint_does_nothing():
    model = layer()
    with torch.no_grad(), fused_forward_ad():
        found = torch.func.jvp(lambda x: checkpoint(model, x, use_reentrant=False), (X,), (V,))
    torch.testing.assert_close(found, torch.func.jvp(model, (X,), (V,)))
