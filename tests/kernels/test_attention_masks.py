"""The attention kernels where weights vanish: masks, biases of whole rows, dropout."""

from __future__ import annotations

import pytest
import torch
from tangent_kernels.attention import Call, attention_jvp
from torch import Tensor

from tests.kernels.attention_calls import (
    assert_close,
    contiguous,
    make_mask,
    problem,
    ragged,
    run,
    tangents_like,
)
from tests.ops import oracle

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.mark.parametrize("name", ["bias of queries", "one bias"])
def test_a_bias_that_shifts_whole_rows(name, device) -> None:
    """Softmax is invariant to it, so its gradient is a sum of terms that cancel."""
    torch.manual_seed(0)
    bias = make_mask(name, (2, 2, 18, 17), dtype=torch.float32, device=device)
    assert bias is not None
    shapes = (2, 2, 18, 8), (2, 2, 17, 8), 8
    call, tangents, grad, grad_t = problem(*shapes, bias, ragged, count=2, device=device)
    output, output_t, primal, tangent, first = run(call, tangents, grad, grad_t)
    primals = (call.query, call.key, call.value)
    # Expanded, the oracle's mask shows each term; a term carries a few roundings.
    whole = [
        None if x is None else x.expand(*x.shape[:-4], 2, 2, 18, 17) for x in (bias, tangents[3])
    ]
    wide = oracle.double([(*primals, whole[0]), (*tangents[:3], whole[1]), grad, grad_t])
    exact = oracle.attention_derivatives(*wide, scale=0.125)
    eps = torch.finfo(torch.float32).eps
    for found, right in ((primal, exact[2]), (tangent, exact[3]), (first, exact[3])):
        *operands, terms = right
        for one, true in zip(found, operands, strict=False):
            assert_close(one, true)
        lead = terms.shape[:-4]
        size = terms.abs().sum_to_size(*lead, *bias.shape)
        assert (found[3].double().abs() <= 16 * eps * size).all()
    oracle.assert_as_good_as((output, output_t), exact[:2], exact[:2])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_a_fully_masked_row_is_zero_everywhere(cross, additive, count, device) -> None:
    torch.manual_seed(0)
    queries, keys = (20, 35) if cross else (20, 20)
    allowed = torch.rand(1, 2, queries, keys, device=device) > 0.3
    allowed[:, :, 3] = allowed[:, :, 19] = False
    allowed[:, 1, 17] = False
    mask = torch.zeros(allowed.shape, device=device).masked_fill(~allowed, -torch.inf)
    dead = ~allowed.any(-1)
    shapes, given = ((1, 2, queries, 8), (1, 2, keys, 8), 8), mask if additive else allowed
    call, tangents, grad, grad_t = problem(*shapes, given, count=count, device=device)
    output, output_t, *grads = run(call, tangents, grad, grad_t)
    for tensor in (output, *output_t, grads[0][0], *grads[1][0], *grads[2][0]):
        assert tensor.isfinite().all()
        assert torch.equal(tensor[dead], torch.zeros_like(tensor[dead]))
    if additive:  # its gradients
        for tensor in (grads[0][3], *grads[1][3], *grads[2][3]):
            assert tensor.isfinite().all()
            assert torch.equal(tensor[~allowed], torch.zeros_like(tensor[~allowed]))
    # With no cotangent for them, dead rows change nothing for keys and values: compare without.
    safe = mask.masked_fill(dead[..., None], 0.0) if additive else allowed | dead[..., None]
    wide = oracle.double([(call.query, call.key, call.value, safe), tangents])
    zeroed = [x.masked_fill(dead[..., None], 0.0).double() for x in (grad, grad_t)]
    exact = oracle.attention_derivatives(*wide, *zeroed, scale=0.125)
    for found, right in ((grads[0], exact[2]), (grads[1], exact[3]), (grads[2], exact[3])):
        for i in (1, 2):
            assert_close(found[i], right[i])


def dropout_call(device, batch=2, heads=2, queries=18, keys=20, p=0.4) -> tuple[Call, Tensor]:
    """A call with dropout, and the factors 0 or 1/(1 - p) of its weights."""
    q = contiguous(batch, heads, queries, 16, device=device)
    k, v = (contiguous(batch, heads, keys, 16, device=device) for _ in range(2))
    seed = 2**40 + 7 + torch.arange(batch, device=device)
    call = Call(q, k, v, None, seed, 0.125, p, False)
    # Values that form an identity show the weights themselves.
    eye = torch.eye(keys, 40, device=device).expand(batch, heads, keys, 40).contiguous()
    shown = attention_jvp(Call(q, k, eye, None, seed, 0.125, p, False))[0][..., :keys]
    weights = (0.125 * q @ k.mT).softmax(-1)
    return call, torch.where(shown > 0.5 * weights, 1 / (1 - p), 0.0)


def test_dropout_is_the_same_for_value_tangent_and_gradients(device) -> None:
    torch.manual_seed(0)
    call, factors = dropout_call(device)
    primals = (call.query, call.key, call.value)
    tangents = tangents_like((*primals, None), 2, (True,) * 4)
    grad = torch.randn_like(call.query)
    grad_t = torch.randn(2, *grad.shape, device=device)
    found = run(call, tangents, grad, grad_t)

    def attend(q, k, v):
        return ((0.125 * q @ k.mT).softmax(-1) * factors.double()) @ v

    leaves = [x.double().requires_grad_() for x in primals]
    leaves_t = [x.double().requires_grad_() for x in tangents if x is not None]
    pairs = [torch.func.jvp(attend, tuple(leaves), tuple(t[r] for t in leaves_t)) for r in (0, 1)]
    output, output_t = pairs[0][0], torch.stack([pair[1] for pair in pairs])
    loss = (output * grad).sum() + (output_t * grad_t).sum()
    grads = torch.autograd.grad(loss, [*leaves, *leaves_t])
    exact = (output, output_t, list(grads[:3]), list(grads[3:]), list(grads[3:]))
    oracle.assert_as_good_as(found, exact, exact)


def test_dropout_drops_a_share_p_and_depends_on_its_seed_alone(device) -> None:
    torch.manual_seed(0)
    call, factors = dropout_call(device, queries=70, keys=40, p=0.3)
    share = float((factors == 0).double().mean())
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / factors.numel()) ** 0.5
    assert len({tuple(part.flatten().tolist()) for part in factors.flatten(0, 1)}) == 4
    again = attention_jvp(call)[0]
    assert torch.equal(again, attention_jvp(call)[0])
    primals = (call.query, call.key, call.value)
    other = Call(*primals, None, torch.tensor([8, 2**40 + 7], device=device), 0.125, 0.3, False)
    swapped = attention_jvp(other)[0]
    assert not torch.equal(again[0], swapped[0]) and not torch.equal(again[1], swapped[1])
    alike = torch.full((2,), 2**40 + 7, device=device)  # one mask for both batch elements
    same = attention_jvp(Call(*primals, None, alike, 0.125, 0.3, False))[0]
    assert torch.equal(same[0], again[0]) and torch.equal(same[1], swapped[1])
