"""Accuracy where it is hard to keep: peaked softmax, large tangents, common offsets, many keys.

The bound is that of every kernel test: twice the error of the eager formula in the same dtype, plus
one rounding of the result; for gradients also what scores of that size cannot but err by.
"""

from __future__ import annotations

import pytest
import torch
from tangent_kernels.attention import attention_jvp

from tangent_ops.ops.backend import interpreting
from tests.kernels.attention_calls import check, make_call
from tests.ops import oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def unit(q, k, v, q_t, k_t, v_t):
    return q, k, v, q_t, k_t, v_t


def peaked(q, k, v, q_t, k_t, v_t):
    """Logits between about -60 and 60: a row attends to one key, or two."""
    return 20 * q, k, v, q_t, k_t, v_t


def large_tangents(q, k, v, q_t, k_t, v_t):
    return q, k, v, 1e3 * q_t, 1e3 * k_t, 1e3 * v_t


def peaked_with_large_tangents(q, k, v, q_t, k_t, v_t):
    return 20 * q, k, v, 1e3 * q_t, k_t, v_t


def offset_keys(q, k, v, q_t, k_t, v_t):
    """An offset of all keys shifts every S_t of a row alike, which must leave O_t unchanged."""
    return q, k + 8, v, q_t, k_t + 8, v_t


def outlying_first_key(q, k, v, q_t, k_t, v_t):
    k, k_t = k.clone(), k_t.clone()
    k[..., 0, :] *= -10
    k_t[..., 0, :] *= 100
    return q, k, v, q_t, k_t, v_t


def outlying_last_key(q, k, v, q_t, k_t, v_t):
    """A key that most rows attend to alone comes when the running sums are complete but for it."""
    k, k_t = k.clone(), k_t.clone()
    k[..., -1, :] *= 10
    k_t[..., -1, :] *= 100
    return q, k, v, q_t, k_t, v_t


CASES = [unit, peaked, large_tangents, peaked_with_large_tangents, offset_keys]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [130, 1030 if interpreting() else 4096])
@pytest.mark.parametrize("case", [*CASES, outlying_first_key, outlying_last_key])
def test_value_and_tangent(case, keys, dtype, device) -> None:
    operands = [x.to(dtype) for x in case(*draw(keys, device))]
    primals, tangents = operands[:3], operands[3:]
    call = make_call(*primals)
    with oracle.poison():
        output, output_t, *_ = attention_jvp(call, *(t[None] for t in tangents))
    exact = oracle.attention_jvp(oracle.double(primals), oracle.double(tangents), scale=0.125)
    eager = oracle.attention_jvp(primals, tangents, scale=0.125)
    oracle.assert_as_good_as((output, output_t[0]), exact, eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, dtype, device) -> None:
    operands = [x.to(dtype) for x in case(*draw(130, device))]
    source = torch.Generator().manual_seed(1)
    grad, grad_t = (torch.randn(operands[0].shape, generator=source) for _ in range(2))
    tangents = [*(t[None] for t in operands[3:]), None]
    call = make_call(*operands[:3])
    check(call, tangents, grad.to(device, dtype), grad_t.to(device, dtype)[None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("masked", ["by none", "causal", "boolean", "additive"])
def test_a_scale_that_is_not_positive(masked, scale, dtype, device) -> None:
    """The kernel multiplies the largest score of a row by the scale, not every score."""
    operands = [x.to(dtype) for x in draw(70, device)]
    primals, tangents = operands[:3], operands[3:]
    mask = None
    if masked == "boolean":
        mask = torch.ones(1, 1, 64, 70, dtype=torch.bool, device=device).tril(3)
    elif masked == "additive":
        bias = torch.randn(1, 1, 64, 70, generator=torch.Generator().manual_seed(1))
        bias[..., :20, 5:] = -torch.inf
        mask = bias.to(device, dtype)
    call = make_call(*primals, mask, scale, masked == "causal")
    with oracle.poison():
        output, output_t, *_ = attention_jvp(call, *(t[None] for t in tangents))
    options = {"scale": scale, "is_causal": masked == "causal"}
    wide = mask if mask is None or masked == "boolean" else mask.double()
    exact = oracle.attention_jvp(
        oracle.double(primals), oracle.double(tangents), attn_mask=wide, **options
    )
    eager = oracle.attention_jvp(primals, tangents, attn_mask=mask, **options)
    oracle.assert_as_good_as((output, output_t[0]), exact, eager)


def draw(keys: int, device: str) -> list[torch.Tensor]:
    """q, k, v and their tangents, unit normal, D = 64."""
    source = torch.Generator().manual_seed(0)
    rows = [64, keys, keys, 64, keys, keys]
    return [torch.randn(1, 1, n, 64, generator=source).to(device) for n in rows]


def test_scores_far_from_zero_do_not_overflow(device) -> None:
    q, k, v, q_t, k_t, v_t = draw(70, device)
    call = make_call(100 * q, k, v, scale=1.0)
    with oracle.poison():
        output, output_t, lse, _ = attention_jvp(call, q_t[None], k_t[None], v_t[None])
    assert lse.max() > 500  # exp(500) is infinite even in float32
    primals = oracle.double([100 * q, k, v])
    exact = oracle.attention_jvp(primals, oracle.double([q_t, k_t, v_t]), scale=1.0)
    # Scores of this size carry an error of eps times themselves in any order of computation.
    allowed = 2 * torch.finfo(torch.float32).eps * float(lse.abs().max())
    for one, right in zip((output, output_t[0]), exact, strict=True):
        assert oracle.error(one, right) < allowed * float(right.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_sequence(dtype, device) -> None:
    assert not interpreting()
    source = torch.Generator(device).manual_seed(0)
    kind = {"generator": source, "device": device, "dtype": dtype}
    operands = [torch.randn(1, 2, 4096, 64, **kind) for _ in range(6)]
    call = make_call(*operands[:3])
    with oracle.poison():
        output, output_t, *_ = attention_jvp(call, *(t[None] for t in operands[3:]))
    exact = oracle.attention_jvp(
        oracle.double(operands[:3]), oracle.double(operands[3:]), scale=0.125
    )
    eager = oracle.attention_jvp(operands[:3], operands[3:], scale=0.125)
    oracle.assert_as_good_as((output, output_t[0]), exact, eager)
