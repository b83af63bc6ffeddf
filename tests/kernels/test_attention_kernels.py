"""The Triton attention kernels against float64 MATH, on a GPU or interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tangent_kernels.attention import (
    Call,
    Tangents,
    attention_jvp,
    attention_second_vjp,
    attention_vjp,
    configs,
)
from torch import Tensor

from tangent_ops.ops.backend import interpreting
from tests.ops import oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter truncates to bfloat16 where a GPU rounds: at odds with eager PyTorch by more than
# twice its error where few keys compete, so there only the home shapes are tried in bfloat16.
DRAWN_DTYPES = [torch.float32, torch.float16] if interpreting() else DTYPES


def packed(batch: int, heads: int, rows: int, dim: int, **kind) -> Tensor:
    """A slice of timm's packed (B, N, 3, H, D) projection, seen as (B, H, N, D)."""
    return torch.randn(batch, rows, 3, heads, dim, **kind)[:, :, 1].transpose(1, 2)


def contiguous(batch: int, heads: int, rows: int, dim: int, **kind) -> Tensor:
    return torch.randn(batch, heads, rows, dim, **kind)


def one_batch_for_all(batch: int, heads: int, rows: int, dim: int, **kind) -> Tensor:
    return torch.randn(heads, rows, dim, **kind).expand(batch, heads, rows, dim)


def strided_last(batch: int, heads: int, rows: int, dim: int, **kind) -> Tensor:
    return torch.randn(batch, heads, rows, 2 * dim, **kind)[..., ::2]


def ragged(batch: int, heads: int, rows: int, dim: int, **kind) -> Tensor:
    """Strides that are no multiples of 8."""
    return torch.randn(batch, heads, rows, dim + 3, **kind)[..., :dim]


LAYOUTS = [packed, contiguous, one_batch_for_all, strided_last, ragged]


def make_mask(name: str, shape: tuple[int, ...], **kind) -> Tensor | None:
    """A mask for scores (B, H, N, M), of size 1 where it is broadcast; every row keeps a key."""
    if name == "none":
        return None
    batch, heads, rows, cols = shape
    sizes = {
        "boolean": (batch, 1, rows, cols),
        "bias of heads": (1, heads, rows, cols),
        "bias of keys": (batch, 1, 1, cols),
        "bias of queries": (1, heads, rows, 1),
        "one bias": (1, 1, 1, 1),
        "with -inf": (1, heads, rows, cols),
    }
    if name == "boolean":
        mask = torch.rand(sizes[name], device=kind["device"]) > 0.3
        mask[..., 0] = True
        return mask
    mask = torch.randn(sizes[name], **kind)
    if name == "with -inf":
        mask[torch.rand(sizes[name], device=kind["device"]) > 0.7] = -torch.inf
        mask[..., -1] = 0.0
    return mask


MASKS = ["boolean", "bias of heads", "bias of keys", "with -inf"]


def run(call: Call, tangents: list[Tensor | None], grad: Tensor, grad_t: Tensor) -> tuple[Any, ...]:
    """Forward, both orders of backward; every element that is returned was written."""
    needs_mask = call.mask is not None and call.mask.is_floating_point()
    needs = (True, True, True, needs_mask)
    needs_t = tuple(t is not None for t in tangents)
    with oracle.poison():
        output, output_t, lse, mu = attention_jvp(call, *tangents)
        primal, tangent = attention_second_vjp(
            call, Tangents(call, *tangents), output, output_t, lse, mu, grad, grad_t,
            needs, needs_t,
        )  # fmt: skip
        first = attention_vjp(call, output, lse, grad_t, needs_t)
    tangent_rows = [rows for grads in tangent[:3] if grads is not None for rows in grads]
    for one in (output, *output_t, *primal[:3], *tangent_rows):
        assert one is not None and one.transpose(1, 2).is_contiguous()
    written = [[x for x in grads if x is not None] for grads in (primal, tangent, first)]
    return output, output_t, *written


def check(call: Call, tangents, grad, grad_t) -> None:
    """The kernels err at most twice as much as eager MATH in the same dtype, plus rounding."""
    primals = (call.query, call.key, call.value, call.mask)
    options = {
        "is_causal": call.is_causal,
        "scale": call.scale,
        "enable_gqa": call.query.shape[1] != call.key.shape[1],
    }
    found = run(call, tangents, grad, grad_t)
    wide = oracle.double([primals, tangents, grad, grad_t])
    exact = oracle.attention_derivatives(*wide, **options)
    eager = oracle.attention_derivatives(primals, tangents, grad, grad_t, **options)
    query, key = call.query.double(), call.key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = float((call.scale * query @ key.mT).abs().max())
    oracle.assert_as_good_as(found[:2], exact[:2], eager[:2], scores)
    with oracle.rounding_as_it_goes():
        eager = oracle.attention_derivatives(primals, tangents, grad, grad_t, **options)
    # By a row of one key, say, the derivatives are 0: scale (dP - δ) k with dP = δ, which are sums
    # over R tangents of (1 + S_t) dO·v, for operands of size 1. Eager PyTorch may find that 0.
    dim, dim_v, count = call.query.shape[-1], call.value.shape[-1], len(grad_t)
    tangent_score = call.scale * (2 * dim) ** 0.5
    terms = call.scale * dim_v**0.5 * (1 + count**0.5 * (1 + tangent_score))
    # The tangents' gradients are those of first order: a map linear in them has one transpose.
    oracle.assert_as_good_as(
        found[2:], (*exact[2:], exact[3]), (*eager[2:], eager[3]), scores, terms
    )


def make_call(query, key, value, mask=None, scale=0.125, causal=False) -> Call:
    return Call(query, key, value, mask, None, scale, 0.0, causal)


def tangents_like(primals, count: int, present) -> list[Tensor | None]:
    return [
        torch.randn(count, *x.shape, dtype=x.dtype, device=x.device)
        if here and x is not None and x.is_floating_point()
        else None
        for x, here in zip(primals, present, strict=True)
    ]


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """Interpreted, a call of few tokens has several tiles, and edges."""
    if interpreting():
        tiles = configs.Config(16, 16, 4, 1)
        monkeypatch.setattr(configs, "_tuned", dict.fromkeys(configs.table(), tiles))


several_tiles = pytest.mark.usefixtures("small_tiles")


@several_tiles
@settings(
    max_examples=16,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking interpreted kernels is slow
)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DRAWN_DTYPES),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2)]),
    queries=st.integers(1, 34),
    keys=st.integers(2, 34),
    dims=st.tuples(st.sampled_from([8, 16, 24, 40]), st.sampled_from([8, 16, 24])),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=3, max_size=3),
    mask=st.sampled_from(["none", "causal", *MASKS]),
    count=st.integers(1, 3),
    present=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    scale=st.sampled_from([0.125, 0.3]),
)
def test_any_call(
    seed, dtype, batch, heads, queries, keys, dims, layouts, mask, count, present, scale, device
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    shapes = [(heads[0], queries, dims[0]), (heads[1], keys, dims[0]), (heads[1], keys, dims[1])]
    operands = [make(batch, *shape, **kind) for make, shape in zip(layouts, shapes, strict=True)]
    bias = make_mask("none" if mask == "causal" else mask, (batch, heads[0], queries, keys), **kind)
    tangents = tangents_like((*operands, bias), count, present)
    if all(t is None for t in tangents):
        tangents = tangents_like((*operands, bias), count, (True, False, False, False))
    call = make_call(*operands, bias, scale, mask == "causal")
    grad = torch.randn(batch, heads[0], queries, dims[1], **kind)
    grad_t = torch.randn(count, batch, heads[0], queries, dims[1], **kind)
    check(call, tangents, grad, grad_t)


# One key tile and a tail of the default tiles; the home shape itself where that takes no seconds.
ROWS = [50, 70] if interpreting() else [50, 197]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_home_shapes(dtype, rows, device) -> None:
    torch.manual_seed(0)
    q, k, v, q_t, k_t, v_t, grad, grad_t = (
        packed(1, 2, rows, 64, dtype=dtype, device=device) for _ in range(8)
    )
    tangents = [q_t[None], k_t[None], v_t[None], None]
    check(make_call(q, k, v), tangents, grad, grad_t[None])


@several_tiles
def test_whole_tiles_and_tails_of_grouped_heads_with_a_bias_of_keys(device) -> None:
    torch.manual_seed(0)
    q, grad = contiguous(1, 2, 18, 24, device=device), contiguous(1, 2, 18, 40, device=device)
    k, v = contiguous(1, 1, 35, 24, device=device), contiguous(1, 1, 35, 40, device=device)
    operands = (q, k, v, torch.randn(1, 1, 1, 35, device=device))
    tangents = tangents_like(operands, 1, (True,) * 4)
    check(make_call(*operands), tangents, grad, torch.randn_like(grad)[None])


@pytest.mark.parametrize("dims", [(256, 136), (72, 256)])
def test_wide_heads_in_two_groups(dims, device) -> None:
    torch.manual_seed(0)
    kind: dict[str, Any] = {"dtype": torch.float16, "device": device}
    shapes = [(4, 5, dims[0]), (2, 7, dims[0]), (2, 7, dims[1])]
    operands = [packed(1, *shape, **kind) for shape in shapes]
    grad = contiguous(1, 4, 5, dims[1], **kind)
    tangents = tangents_like((*operands, None), 1, (True,) * 4)
    check(make_call(*operands), tangents, grad, torch.randn_like(grad)[None])


@pytest.mark.parametrize("queries, keys", [(40, 40), (18, 50), (50, 18)])
@pytest.mark.parametrize("config", [(16, 32), (32, 16), (16, 16)])
def test_causal_in_tiles_of_any_shape(queries, keys, config, device) -> None:
    """The diagonal crosses tiles that are wide, high, or reach past the end."""
    torch.manual_seed(0)
    q, grad = (contiguous(1, 1, queries, 16, device=device) for _ in range(2))
    k, v = (contiguous(1, 1, keys, 16, device=device) for _ in range(2))
    call = make_call(q, k, v, causal=True)
    tangents = tangents_like((q, k, v, None), 1, (True,) * 4)
    with pytest.MonkeyPatch.context() as patch:
        tiles = configs.Config(*config, num_warps=4, num_stages=1)
        patch.setattr(configs, "_tuned", dict.fromkeys(map_keys(call), tiles))
        check(call, tangents, grad, torch.randn_like(grad)[None])


def map_keys(call: Call):
    return [configs.key_of(direction, call) for direction in configs.DIRECTIONS]


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """Grows by one for each tile product that the interpreter computes."""
    if not interpreting():
        pytest.skip("counts the interpreter's products")
    from triton.runtime import interpreter

    counted: list[int] = []
    original = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, *a: counted.append(1) or original(self, *a),
    )
    return counted


@pytest.mark.parametrize("present", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_products_of_a_missing_tangent_are_not_computed(present, device, products) -> None:
    """Query alone takes 4 of 6 products, key 4, value 3, the mask 3; none of zeros."""
    operands = [contiguous(1, 1, 16, 16, device=device) for _ in range(3)]
    bias = torch.randn(1, 1, 16, 16, device=device)
    call = make_call(*operands, bias)
    attention_jvp(call, *tangents_like((*operands, bias), 1, present))
    assert len(products) == {0: 4, 1: 4, 2: 3, 3: 3}[present.index(1)]
    products.clear()
    attention_jvp(call, *tangents_like((*operands, bias), 1, (1, 1, 1, 1)))
    assert len(products) == 6


def test_many_tangents_share_scores_and_softmax(device, products, monkeypatch) -> None:
    """2 + 4R products for R tangents in one program, not 6R."""
    operands = [contiguous(1, 1, 16, 16, device=device) for _ in range(3)]
    call = make_call(*operands)
    tiles = configs.Config(16, 16, 4, 1)
    monkeypatch.setattr(configs, "_tuned", dict.fromkeys(map_keys(call), tiles))
    attention_jvp(call, *tangents_like((*operands, None), 4, (1, 1, 1, 1)))
    assert len(products) == 2 + 4 * 4
    products.clear()
    attention_jvp(call, *tangents_like((*operands, None), 7, (1, 1, 1, 1)))  # 4 + 2 + 1
    assert len(products) == 3 * 2 + 4 * 7


@several_tiles
@pytest.mark.parametrize("name", ["bias of queries", "one bias"])
def test_a_bias_that_shifts_whole_rows(name, device) -> None:
    """Softmax does not notice it: its gradient is a sum of terms that cancel."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"device": device}
    q, grad = (ragged(2, 2, 18, 8, **kind) for _ in range(2))
    k, v = (ragged(2, 2, 17, 8, **kind) for _ in range(2))
    bias = make_mask(name, (2, 2, 18, 17), dtype=torch.float32, **kind)
    assert bias is not None
    tangents = tangents_like((q, k, v, bias), 2, (True,) * 4)
    grad_t = torch.randn(2, *grad.shape, **kind)
    call = make_call(q, k, v, bias)
    output, output_t, primal, tangent, first = run(call, tangents, grad, grad_t)
    # Expanded, the oracle's mask shows each term; a term carries a few roundings.
    whole = [
        None if x is None else x.expand(*x.shape[:-4], 2, 2, 18, 17) for x in (bias, tangents[3])
    ]
    wide = oracle.double([(q, k, v, whole[0]), (*tangents[:3], whole[1]), grad, grad_t])
    exact = oracle.attention_derivatives(*wide, scale=0.125)
    eps = torch.finfo(torch.float32).eps
    for found, right in ((primal, exact[2]), (tangent, exact[3]), (first, exact[3])):
        *operands, terms = right
        for one, true in zip(found, operands, strict=False):
            assert oracle.error(one, true) < 1e-5 * float(true.norm())
        lead = terms.shape[:-4]
        size = terms.abs().sum_to_size(*lead, *bias.shape)
        assert (found[3].double().abs() <= 16 * eps * size).all()
    oracle.assert_as_good_as((output, output_t), exact[:2], exact[:2])


@several_tiles
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_a_fully_masked_row_is_zero_everywhere(cross, additive, count, device) -> None:
    torch.manual_seed(0)
    queries, keys = (20, 35) if cross else (20, 20)
    q, grad = (contiguous(1, 2, queries, 8, device=device) for _ in range(2))
    k, v = (contiguous(1, 2, keys, 8, device=device) for _ in range(2))
    allowed = torch.rand(1, 2, queries, keys, device=device) > 0.3
    allowed[:, :, 3] = allowed[:, :, 19] = False
    allowed[:, 1, 17] = False
    mask = torch.zeros(allowed.shape, device=device).masked_fill(~allowed, -torch.inf)
    operands = (q, k, v, mask if additive else allowed)
    dead = ~allowed.any(-1)
    tangents = tangents_like(operands, count, (True,) * 4)
    grad_t = torch.randn(count, *grad.shape, device=device)
    output, output_t, *grads = run(make_call(*operands), tangents, grad, grad_t)
    for tensor in (output, *output_t, grads[0][0], *grads[1][0], *grads[2][0]):
        assert tensor.isfinite().all()
        assert torch.equal(tensor[dead], torch.zeros_like(tensor[dead]))
    if additive:  # its gradients
        for tensor in (grads[0][3], *grads[1][3], *grads[2][3]):
            assert tensor.isfinite().all()
            assert torch.equal(tensor[~allowed], torch.zeros_like(tensor[~allowed]))
    # With no cotangent for them, dead rows change nothing for keys and values: compare without.
    safe = mask.masked_fill(dead[..., None], 0.0) if additive else allowed | dead[..., None]
    wide = oracle.double([(q, k, v, safe), tangents])
    zeroed = [x.masked_fill(dead[..., None], 0.0).double() for x in (grad, grad_t)]
    exact = oracle.attention_derivatives(*wide, *zeroed, scale=0.125)
    for found, right in ((grads[0], exact[2]), (grads[1], exact[3]), (grads[2], exact[3])):
        for i in (1, 2):
            assert oracle.error(found[i], right[i]) < 1e-5 * float(right[i].norm())


def dropout_call(device, batch=2, heads=2, queries=18, keys=20, p=0.4) -> tuple[Call, Tensor]:
    """A call with dropout, and the factors 0 or 1/(1 - p) that its weights are multiplied by."""
    q = contiguous(batch, heads, queries, 16, device=device)
    k, v = (contiguous(batch, heads, keys, 16, device=device) for _ in range(2))
    seed = 2**40 + 7 + torch.arange(batch, device=device)
    call = Call(q, k, v, None, seed, 0.125, p, False)
    # Values that form an identity show the weights themselves.
    eye = torch.eye(keys, 40, device=device).expand(batch, heads, keys, 40).contiguous()
    shown = attention_jvp(Call(q, k, eye, None, seed, 0.125, p, False))[0][..., :keys]
    weights = (0.125 * q @ k.mT).softmax(-1)
    return call, torch.where(shown > 0.5 * weights, 1 / (1 - p), 0.0)


@several_tiles
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


@several_tiles
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


@several_tiles
@pytest.mark.parametrize(
    "needs",
    [(True, False, False, False), (False, True, False, False), (False, False, True, False),
     (False, False, False, True)],
)  # fmt: skip
def test_a_gradient_that_is_not_needed_is_not_computed(needs, device) -> None:
    torch.manual_seed(0)
    q, k, v, grad = (contiguous(1, 2, 18, 8, device=device) for _ in range(4))
    bias = torch.randn(1, 2, 18, 18, device=device)
    call, tangents = make_call(q, k, v, bias), tangents_like((q, k, v, bias), 1, (True,) * 4)
    grad_t = torch.randn_like(grad)[None]
    with oracle.poison():
        output, output_t, lse, mu = attention_jvp(call, *tangents)
        first = attention_vjp(call, output, lse, grad_t, needs)
        primal, tangent = attention_second_vjp(
            call, Tangents(call, *tangents), output, output_t, lse, mu, grad, grad_t,
            needs, needs[::-1],
        )  # fmt: skip
    wide = oracle.double([(q, k, v, bias), tangents, grad, grad_t])
    *_, exact, exact_t = oracle.attention_derivatives(*wide, scale=0.125)
    for found, right, wanted in (
        (first, exact_t, needs), (primal, exact, needs), (tangent, exact_t, needs[::-1]),
    ):  # fmt: skip
        for need, one, true in zip(wanted, found, right, strict=True):
            assert (one is not None) == need
            if one is not None:
                assert oracle.error(one, true) < 1e-5 * float(true.norm())


@several_tiles
def test_gradients_are_the_same_bits_in_every_run(device) -> None:
    torch.manual_seed(0)
    rows = 18 if interpreting() else 200
    q = contiguous(2, 2, rows, 8, device=device, dtype=torch.float16)
    k, v = (contiguous(2, 1, rows, 8, device=device, dtype=torch.float16) for _ in range(2))
    bias = torch.randn(1, 2, rows, rows, device=device, dtype=torch.float16)
    call = make_call(q, k, v, bias)
    tangents = tangents_like((q, k, v, bias), 2, (True,) * 4)
    grad, grad_t = torch.randn_like(q), torch.randn(2, *q.shape, device=device).half()
    runs = []
    for _ in range(2 if interpreting() else 5):
        output, output_t, lse, mu = attention_jvp(call, *tangents)
        primal, tangent = attention_second_vjp(
            call, Tangents(call, *tangents), output, output_t, lse, mu, grad, grad_t,
            (True,) * 4, (True,) * 4,
        )  # fmt: skip
        runs.append([output, output_t, lse, mu, *primal, *tangent])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_one_key_has_no_gradient(device) -> None:
    torch.manual_seed(0)
    q, k, v, q_t, k_t, v_t, grad = (contiguous(1, 2, 1, 24, device=device) for _ in range(7))
    call = make_call(q, k, v)
    with oracle.poison():
        output, output_t, lse, _ = attention_jvp(call, q_t[None], k_t[None], v_t[None])
        grads = attention_vjp(call, output, lse, grad[None], (True, True, True, False))
    found = (output, output_t[0], *(x[0] for x in grads if x is not None))
    exact = (v, v_t, torch.zeros_like(q), torch.zeros_like(k), grad)
    for one, right in zip(found, exact, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-6, atol=1e-5)


def test_an_empty_batch(device) -> None:
    q = torch.empty(0, 2, 5, 16, device=device)
    call = make_call(q, q, q)
    output, output_t, lse, mu = attention_jvp(call, q[None])
    assert output.shape == output_t[0].shape == q.shape
    assert lse.shape == mu[0].shape == q.shape[:3]
    grads = attention_vjp(call, output, lse, q[None], (True, True, True, False))
    assert [x.shape for x in grads if x is not None] == [(1, *q.shape)] * 3


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """The last batch element starts more than 2**31 elements into the tensor."""
    torch.manual_seed(0)
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    base = torch.randn(2, 2**31 + 2**20, **kind)
    q, k, v, q_t, k_t, v_t, grad, grad_t = (
        base[:, i * 2**16 :][:, : 64 * 64].view(2, 1, 64, 64) for i in range(8)
    )
    tangents = [q_t[None], k_t[None], v_t[None], None]
    check(make_call(q, k, v), tangents, grad, grad_t[None])
