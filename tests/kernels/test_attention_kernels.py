"""The Triton attention kernels against float64 MATH, on a GPU or interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tangent_kernels import _launch
from tangent_kernels.attention import (
    Call,
    Tangents,
    attention_jvp,
    attention_second_vjp,
    attention_vjp,
    configs,
    forward,
)

from tangent_ops.ops.backend import interpreting
from tests.kernels.attention_calls import (
    LAYOUTS,
    MASKS,
    assert_close,
    check,
    contiguous,
    make_call,
    make_mask,
    packed,
    problem,
    tangents_like,
)
from tests.ops import oracle
from tests.ops.backends import examples

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter truncates to bfloat16 where a GPU rounds. Where few keys compete, that exceeds
# twice the error of eager PyTorch, so the interpreter runs only the home shapes in bfloat16.
DRAWN_DTYPES = [torch.float32, torch.float16] if interpreting() else DTYPES


several_tiles = pytest.mark.usefixtures("small_tiles")


@pytest.fixture(params=[False, True], ids=["together", "apart"])
def second_order(request, small_tiles, monkeypatch) -> None:
    """Launches of second order for all gradients, or for the primal ones alone."""
    if request.param:
        tiles = configs.Config(16, 16, 4, 1)
        keys = [key for key in configs.table() if key.direction.startswith("second")]
        primal = [key._replace(direction=key.direction.replace("second", "primal")) for key in keys]
        monkeypatch.setattr(configs, "_tuned", configs._tuned | dict.fromkeys(primal, tiles))


@several_tiles
@examples(16)
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


# One key tile, and a tail of the default tiles; on a GPU the home shape itself.
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


@pytest.mark.usefixtures("second_order")
def test_whole_tiles_and_tails_of_grouped_heads_with_a_bias_of_keys(device) -> None:
    torch.manual_seed(0)
    bias = torch.randn(1, 1, 1, 35, device=device)
    check(*problem((1, 2, 18, 24), (1, 1, 35, 24), 40, bias, count=2, device=device))


@pytest.mark.parametrize("dims", [(256, 136), (72, 256)])
def test_wide_heads_in_two_groups(dims, device) -> None:
    torch.manual_seed(0)
    shapes = (1, 4, 5, dims[0]), (1, 2, 7, dims[0]), dims[1]
    check(*problem(*shapes, make=packed, dtype=torch.float16, device=device))


@pytest.mark.parametrize("mask", ["none", "bias of heads"])
def test_more_tangents_than_one_launch_takes(mask, device, monkeypatch) -> None:
    """Five, with CUDA's limit lowered to one group of tangents: groups of two, or of one."""
    for module in (_launch, forward):
        monkeypatch.setattr(module, "MAX_GROUPS", 1)
    torch.manual_seed(0)
    kind: dict[str, Any] = {"dtype": torch.float16, "device": device}
    bias = make_mask(mask, (1, 2, 5, 7), **kind)
    check(*problem((1, 2, 5, 16), (1, 2, 7, 16), 16, bias, count=5, **kind))


@pytest.mark.parametrize("queries, keys", [(40, 40), (18, 50), (50, 18)])
@pytest.mark.parametrize("config", [(16, 32), (32, 16), (16, 16)])
def test_causal_in_tiles_of_any_shape(queries, keys, config, device, monkeypatch) -> None:
    """The diagonal crosses tiles that are wide, high, or reach past the end."""
    torch.manual_seed(0)
    call, *others = problem((1, 1, queries, 16), (1, 1, keys, 16), 16, causal=True, device=device)
    tiles = configs.Config(*config, num_warps=4, num_stages=1)
    monkeypatch.setattr(configs, "_tuned", dict.fromkeys(map_keys(call), tiles))
    check(call, *others)


def map_keys(call: Call):
    together = [one for one in configs.DIRECTIONS if not one.startswith("primal")]
    return [configs.key_of(direction, call) for direction in together]


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


@pytest.mark.usefixtures("second_order")
@pytest.mark.parametrize(
    "needs",
    [(True, False, False, False), (False, True, False, False), (False, False, True, False),
     (False, False, False, True)],
)  # fmt: skip
def test_a_gradient_that_is_not_needed_is_not_computed(needs, device) -> None:
    torch.manual_seed(0)
    bias, shape = torch.randn(1, 2, 18, 18, device=device), (1, 2, 18, 8)
    call, tangents, grad, grad_t = problem(shape, shape, 8, bias, device=device)
    with oracle.poison():
        output, output_t, lse, mu = attention_jvp(call, *tangents)
        first = attention_vjp(call, output, lse, grad_t, needs)
        primal, tangent = attention_second_vjp(
            call, Tangents(call, *tangents), output, output_t, lse, mu, grad, grad_t,
            needs, needs[::-1],
        )  # fmt: skip
    primals = (call.query, call.key, call.value, bias)
    wide = oracle.double([primals, tangents, grad, grad_t])
    *_, exact, exact_t = oracle.attention_derivatives(*wide, scale=0.125)
    for found, right, wanted in (
        (first, exact_t, needs), (primal, exact, needs), (tangent, exact_t, needs[::-1]),
    ):  # fmt: skip
        for need, one, true in zip(wanted, found, right, strict=True):
            assert (one is not None) == need
            if need:
                assert_close(one, true)


@several_tiles
def test_gradients_are_the_same_bits_in_every_run(device) -> None:
    torch.manual_seed(0)
    rows = 18 if interpreting() else 200
    kind: dict[str, Any] = {"dtype": torch.float16, "device": device}
    bias, shapes = torch.randn(1, 2, rows, rows, **kind), [(2, h, rows, 8) for h in (2, 1)]
    call, tangents, grad, grad_t = problem(*shapes, 8, bias, count=2, **kind)
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
    call, tangents, _, grad_t = problem((1, 2, 1, 24), (1, 2, 1, 24), 24, device=device)
    with oracle.poison():
        output, output_t, lse, _ = attention_jvp(call, *tangents)
        grads = attention_vjp(call, output, lse, grad_t, (True, True, True, False))
    found = (output, output_t, *(x for x in grads if x is not None))
    zero = torch.zeros_like(grad_t)
    exact = (call.value, tangents[2], zero, zero, grad_t)
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
