"""What the launchers refuse, before anything is launched."""

from __future__ import annotations

import pytest
import torch
from tangent_kernels._launch import readable
from tangent_kernels.attention import (
    Call,
    Tangents,
    attention_jvp,
    attention_second_vjp,
    attention_vjp,
)

GOOD = {
    "query": torch.randn(2, 4, 5, 16),
    "key": torch.randn(2, 2, 6, 16),
    "value": torch.randn(2, 2, 6, 24),
    "mask": torch.randn(1, 4, 5, 6),
    "seed": None,
    "scale": 0.25,
    "dropout_p": 0.0,
    "is_causal": False,
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": torch.randn(4, 5, 16)}, r"query is \(4, 5, 16\): expected \(batch, heads"),
        ({"query": GOOD["query"].double()}, "query is torch.float64"),
        ({"key": GOOD["key"].half()}, "key is torch.float16, query torch.float32"),
        ({"value": GOOD["value"].long()}, "value is torch.int64"),
        ({"query": torch.randn(2, 4, 5, 12)}, "query's head_dim is 12: expected a multiple of 8"),
        ({"value": torch.randn(2, 2, 6, 264)}, "value's head_dim is 264"),
        ({"key": torch.randn(2, 2, 6, 24)}, r"key is \(2, 2, 6, 24\), query \(2, 4, 5, 16\)"),
        ({"key": torch.randn(2, 3, 6, 16)}, "key heads that divide the query heads"),
        ({"value": torch.randn(2, 2, 7, 24)}, r"value is \(2, 2, 7, 24\), key"),
        ({"query": torch.randn(2, 4, 0, 16)}, "0 queries and 6 keys"),
        ({"mask": torch.randn(4, 5, 6)}, r"mask is \(4, 5, 6\): expected \(2, 4, 5, 6\), or 1"),
        ({"mask": torch.randn(1, 2, 5, 6)}, r"mask is \(1, 2, 5, 6\)"),
        ({"mask": torch.ones(1, 4, 5, 6).long()}, "mask is torch.int64: expected bool or float"),
        ({"mask": torch.randn(1, 4, 5, 6, device="meta")}, "mask is on meta, query on cpu"),
        ({"key": torch.randn(2, 2, 6, 16, device="meta")}, "key is on meta, query on cpu"),
        ({"dropout_p": 0.5}, "dropout_p is 0.5, seed absent"),
        ({"dropout_p": 1.0, "seed": torch.ones(2).long()}, "dropout_p is 1.0, seed given"),
        ({"dropout_p": 0.5, "seed": torch.ones(2)}, "seed is torch.float32"),
        ({"dropout_p": 0.5, "seed": torch.ones(3).long()}, r"seed is torch.int64 \(3,\): expected"),
    ],
)
def test_operands(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        Call(**(GOOD | change))


@pytest.mark.parametrize(
    "tangents, message",
    [
        ({"query_t": torch.randn(3, 2, 4, 5, 8)}, r"query_t is .* \(3, 2, 4, 5, 8\): expected"),
        ({"query_t": torch.randn(2, 4, 5, 16)}, r"query_t is .* as query with R="),
        ({"key_t": torch.randn(3, 2, 2, 6, 16).half()}, "key_t is torch.float16"),
        ({"value_t": torch.randn(3, 2, 2, 6, 24, device="meta")}, "value_t is on meta"),
        (
            {"query_t": torch.randn(3, 2, 4, 5, 16), "key_t": torch.randn(2, 2, 2, 6, 16)},
            "key_t is .* with R=3 in front",
        ),
        ({"mask_t": torch.randn(1, 2, 4, 5, 6)}, r"mask_t is .* expected .*\(1, 1, 4, 5, 6\)"),
    ],
)
def test_tangents(tangents, message) -> None:
    names = ("query_t", "key_t", "value_t", "mask_t")
    with pytest.raises(ValueError, match=message):
        Tangents(Call(**GOOD), *(tangents.get(name) for name in names))


@pytest.mark.parametrize("mask", [None, torch.ones(1, 4, 5, 6).bool()])
def test_a_tangent_of_no_mask_or_a_boolean_one(mask) -> None:
    call = Call(**(GOOD | {"mask": mask}))
    with pytest.raises(ValueError, match="mask_t is given: expected None"):
        Tangents(call, None, None, None, torch.randn(1, 1, 4, 5, 6))


def test_cotangents() -> None:
    call = Call(**GOOD)
    tangents = Tangents(call, torch.randn(1, 2, 4, 5, 16), None, None, None)
    output, lse = torch.randn(2, 4, 5, 24), torch.randn(2, 4, 5)
    needs = (True, True, True, True)
    for bad in (torch.randn(2, 4, 5, 24), torch.randn(1, 2, 4, 5, 24).half()):
        with pytest.raises(ValueError, match="grad_output is"):
            attention_vjp(call, output, lse, bad, needs)
        with pytest.raises(ValueError, match="grad_output_t is"):
            attention_second_vjp(
                call, tangents, output, output[None], lse, lse[None], None, bad, needs, needs
            )


def test_any_stride_is_taken(device) -> None:
    """An operand whose last stride is not 1 is copied, at the cost of memory alone."""
    make = lambda heads, rows, dim: torch.randn(2, heads, dim, rows, device=device).mT  # noqa: E731
    operands = [make(4, 5, 16), make(2, 6, 16), make(2, 6, 24)]
    call = Call(*operands, None, None, 0.25, 0.0, False)
    dense = Call(*(x.contiguous() for x in operands), None, None, 0.25, 0.0, False)
    assert torch.equal(attention_jvp(call)[0], attention_jvp(dense)[0])


@pytest.mark.parametrize("stride, copied", [(2**24 - 8, False), (2**24, True)])
def test_rows_too_far_apart_for_32_bits_are_copied(stride, copied) -> None:
    """A tile has up to 128 rows: a row at 127 strides must lie within 2^31 elements."""
    tensor = torch.empty_strided((1, 1, 200, 16), (0, 0, stride, 1), device="meta")
    found = readable(tensor)
    assert found is not None and (found is not tensor) == copied
    assert found.is_contiguous() == copied
