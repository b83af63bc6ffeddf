"""The attention op by its default backend for the CPU: masks, dropout, precision, refusals.

Subsets of tangents, gradients and nestings are in test_dual_ops.py, shapes in test_edges.py and
test_attention_in_parts.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import tangent_ops
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.ops import backend as _backend
from tests.ops import oracle

attention = tangent_ops.scaled_dot_product_attention


def draw(*shape: int, dtype: torch.dtype = torch.float64, count: int = 1) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(count)]


def close(found, exact) -> None:
    for one, right in zip(found, exact, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype) -> None:
    torch.manual_seed(0)
    primals, tangents = draw(2, 3, 50, 16, dtype=dtype, count=3), draw(2, 3, 50, 16, count=3)
    tangents = [t.to(dtype) for t in tangents]
    found = torch.func.jvp(attention, tuple(primals), tuple(tangents))
    assert found[0].dtype == found[1].dtype == dtype
    exact = oracle.attention_jvp(oracle.double(primals), oracle.double(tangents))
    oracle.assert_as_good_as(found, exact, oracle.attention_jvp(primals, tangents))


def test_autocast_casts_mixed_operands_as_pytorchs_does() -> None:
    torch.manual_seed(0)
    query, key, value = draw(1, 2, 5, 16, dtype=torch.float32, count=3)
    query_t, key_t, value_t = draw(1, 2, 5, 16, dtype=torch.float32, count=3)
    value, value_t = value.bfloat16(), value_t.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.func.jvp(attention, (query, key, value), (query_t, key_t, value_t))
        plain = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert found[0].dtype == found[1].dtype == plain.dtype == torch.bfloat16
    primals = [x.bfloat16() for x in (query, key, value)]
    tangents = [x.bfloat16() for x in (query_t, key_t, value_t)]
    exact = oracle.attention_jvp(oracle.double(primals), oracle.double(tangents))
    oracle.assert_as_good_as(found, exact, oracle.attention_jvp(primals, tangents))


MASKS = {
    "boolean": torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]]).bool(),
    "per head": torch.rand(3, 1, 4, generator=torch.Generator().manual_seed(1)) > 0.3,
    "additive": torch.randn(1, 3, 3, 4, generator=torch.Generator().manual_seed(2)).double(),
    "one row": torch.tensor([0.5, -1.0, 2.0, 0.0]).double(),
    "additive with -inf": torch.tensor([[0.0, -torch.inf, 1.0, 2.0]]).double(),
}


CASES = {
    **{name: (3, 4, {"attn_mask": mask}) for name, mask in MASKS.items()},
    "causal": (5, 5, {"is_causal": True}),
    "causal, more keys": (3, 6, {"is_causal": True}),
    "causal, more queries": (6, 3, {"is_causal": True}),
}


@pytest.mark.parametrize(("queries", "keys", "options"), CASES.values(), ids=CASES)
def test_masks(queries, keys, options) -> None:
    torch.manual_seed(0)
    primals = [*draw(2, 3, queries, 5), *draw(2, 3, keys, 5, count=2)]
    tangents = [torch.randn_like(p) for p in primals]
    found = torch.func.jvp(lambda *a: attention(*a, **options), tuple(primals), tuple(tangents))
    close(found, oracle.attention_jvp(primals, tangents, **options))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("inside_reverse_mode", [False, True])
def test_a_fully_masked_row_is_zero_everywhere(additive, inside_reverse_mode) -> None:
    torch.manual_seed(0)
    primals, tangents = draw(1, 2, 3, 4, count=3), draw(1, 2, 3, 4, count=3)
    mask = torch.tensor([[True] * 3, [False] * 3, [True, False, True]])
    if additive:
        mask = torch.zeros(3, 3, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    if inside_reverse_mode:
        primals = [p.requires_grad_() for p in primals]
    leaves = [t.requires_grad_() for t in tangents]
    output, output_t = torch.func.jvp(
        lambda *a: attention(*a, attn_mask=mask), tuple(primals), tuple(leaves)
    )
    assert torch.equal(output[:, :, 1], torch.zeros(1, 2, 4, dtype=torch.float64))
    assert torch.equal(output_t[:, :, 1], torch.zeros(1, 2, 4, dtype=torch.float64))
    live = [0, 2]
    exact = oracle.attention_jvp([primals[0][:, :, live], *primals[1:]],
        [tangents[0][:, :, live], *tangents[1:]], attn_mask=mask[live])  # fmt: skip
    close((output[:, :, live], output_t[:, :, live]), exact)
    grad_query_t, grad_key_t, grad_value_t = torch.autograd.grad(output_t.sum(), leaves)
    assert torch.equal(grad_query_t[:, :, 1], torch.zeros(1, 2, 4, dtype=torch.float64))
    assert grad_key_t.isfinite().all() and grad_value_t.isfinite().all()


def test_dropout_drops_the_same_weights_from_output_and_tangent() -> None:
    """With value = identity the output shows the dropped weights; so must the tangent."""
    torch.manual_seed(0)
    query, key = draw(1, 2, 6, 4, count=2)
    query_t, key_t = draw(1, 2, 6, 4, count=2)
    value = torch.eye(6, dtype=torch.float64).repeat(1, 2, 1, 1)
    found, found_t = torch.func.jvp(
        lambda q, k: attention(q, k, value, dropout_p=0.4), (query, key), (query_t, key_t)
    )
    whole, whole_t = oracle.attention_jvp(
        [query, key, value], [query_t, key_t, torch.zeros_like(value)]
    )
    kept = found != 0
    assert 0 < kept.sum() < kept.numel()
    close((found, found_t), (whole * kept / 0.6, whole_t * kept / 0.6))


def test_without_tangents_it_is_pytorchs(monkeypatch) -> None:
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: calls.append(k) or plain(*a, **k),
    )
    query, key, value = draw(1, 2, 3, 4, dtype=torch.float32, count=3)
    found = attention(query, key, value, scale=0.5)
    assert torch.equal(found, plain(query, key, value, scale=0.5))
    with forward_ad.dual_level():
        attention(query, key, value)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key": torch.randn(1, 2, 3, 5)}, "head_dim"),
        ({"value": torch.randn(1, 2, 4, 4)}, "differ in tokens"),
        ({"key": torch.randn(1, 2, 3, 4).half()}, "key is torch.float16 but query is"),
        ({"query": torch.ones(1, 2, 3, 4, dtype=torch.int64)}, "query is torch.int64"),
        ({"query": torch.randn(4)}, r"query is \(4,\)"),
        (
            {"key": torch.randn(1, 2, 0, 4), "value": torch.randn(1, 2, 0, 4)},
            "key is .*expected a token",
        ),
        ({"query": torch.randn(1, 3, 3, 4)}, "enable_gqa=True"),
        ({"query": torch.randn(1, 3, 3, 4), "enable_gqa": True}, "divide the query heads"),
        ({"attn_mask": torch.ones(7, 7).bool()}, "does not broadcast"),
        ({"attn_mask": torch.ones(5, 1, 3, 3).bool()}, "does not broadcast"),
        ({"attn_mask": torch.ones(3, 3).long()}, "expected bool or floating point"),
        ({"attn_mask": torch.ones(3, 3).bool(), "is_causal": True}, "exclude each other"),
        ({"dropout_p": 1.0}, "dropout_p=1.0"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"value": torch.randn(1, 2, 3, 4, device="meta")}, "value is on meta but query is on cpu"),
        (
            {"attn_mask": torch.ones(3, 3, device="meta").bool()},
            "attn_mask is on meta but query is on cpu",
        ),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    good = dict(zip(("query", "key", "value"), torch.randn(3, 1, 2, 3, 4), strict=True))
    with pytest.raises(ArgumentError, match=message):
        attention(**(good | change))


def test_triton_is_never_replaced_in_silence(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    primals = torch.randn(3, 1, 2, 3, 16).unbind()
    with pytest.raises(UnsupportedError, match="tensors are on cpu, the kernels run on CUDA"):
        attention(*primals, backend="triton")


@pytest.mark.parametrize(
    "dim, dtype", [(12, torch.float32), (264, torch.float32), (16, torch.float64)]
)
def test_triton_names_the_shape_or_dtype_it_lacks(dim, dtype) -> None:
    primals = torch.randn(3, 1, 2, 3, dim, dtype=dtype).unbind()
    with pytest.raises(NotImplementedError, match=r"query's head_dim|dtype torch.float64"):
        attention(*primals, backend="triton")
    query, key = torch.randn(2, 1, 2, 3, 16).unbind()
    with pytest.raises(NotImplementedError, match=r"value's head_dim 12 is not a multiple of 8"):
        attention(query, key, torch.randn(1, 2, 3, 12), backend="triton")


def test_a_cuda_tensor_without_triton_is_told_so(monkeypatch) -> None:
    class OnCuda:
        is_cuda, device = True, "cuda:0"

    assert _backend.choose_backend(None, OnCuda(), None) == "triton"
    monkeypatch.setattr(_backend, "_TRITON_IS_INSTALLED", False)
    for backend in (None, "triton"):
        with pytest.raises(UnsupportedError, match=r"pip install triton.*backend='reference'"):
            _backend.choose_backend(backend, OnCuda(), None)
    assert _backend.choose_backend("reference", OnCuda(), None) == "reference"
    assert _backend.choose_backend(None, OnCuda(), "dtype float64") == "reference"


def test_a_boolean_mask_and_a_tangent_of_another_shape_or_dtype_are_refused_by_pytorch() -> None:
    query, key, value = draw(1, 2, 3, 4, count=3)
    with pytest.raises(RuntimeError, match="only Tensors of floating point"):
        torch.ones(3, 3, dtype=torch.bool).requires_grad_()
    for bad in (query[..., :2], query.float()):
        message = r"forward grad|expected scalar type"
        with pytest.raises(RuntimeError, match=message), forward_ad.dual_level():
            attention(forward_ad.make_dual(query, bad), key, value)
