import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import double, exact_jvp, images, vit

import tangent_ops
from tangent_ops.composition.task_arithmetic import add, negate, scale
from tangent_ops.delta import Delta, DeltaMeta, save_delta
from tangent_ops.errors import ArgumentError, DeltaError

META = DeltaMeta("a" * 64, "tiny", "head", loss="square", shard="0", extra={"note": "x"})


def some_deltas(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"head.weight": (3, 4), "head.bias": (3,)}
    return [
        Delta({n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}, META)
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_add_is_the_sum(count):
    deltas = some_deltas(count)
    found = add(*deltas)
    for name, value in found.items():
        exact = np.sum([delta[name].double().numpy() for delta in deltas], axis=0)
        assert value.dtype == torch.float32
        assert np.array_equal(value.numpy(), exact.astype(np.float32))
    assert found.meta == dataclasses.replace(META, shard=None, extra={})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_negate_turns_the_sign_bit_for_bit(dtype):
    (delta,) = some_deltas(1, dtype)
    delta["head.bias"][:2] = torch.tensor([0.0, -0.0])
    found = negate(delta)
    for name, value in delta.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], -value)
        assert torch.equal(found[name].signbit(), ~value.signbit())


@given(factor=st.floats(-3, 3))
@settings(max_examples=20, deadline=None)
def test_scale_multiplies(factor):
    (delta,) = some_deltas(1)
    for name, value in scale(delta, factor).items():
        exact = delta[name].double().numpy() * factor
        assert np.array_equal(value.numpy(), exact.astype(np.float32))


def test_operations_on_deltas_are_operations_on_outputs():
    """f + 0.5 (J a - J b), with J by torch.func.jvp."""
    tangent = tangent_ops.linearize(vit().double(), r"^(blocks\.2|head)\.")
    torch.manual_seed(0)
    own = tangent.delta_dict()
    a, b = (
        Delta({name: 0.05 * torch.randn_like(value) for name, value in own.items()}, own.meta)
        for _ in range(2)
    )
    inputs = double(images())
    tangent.load_delta_dict(scale(add(a, negate(b)), 0.5))
    with torch.no_grad():
        found = tangent(inputs)
    primal, effect_a = exact_jvp(tangent.anchor, a, inputs)
    _, effect_b = exact_jvp(tangent.anchor, b, inputs)
    assert float((effect_a - effect_b).abs().max()) > 1e-3  # they do something
    assert torch.allclose(found, primal + 0.5 * (effect_a - effect_b), rtol=0, atol=1e-12)


def test_files_do_as_well(tmp_path):
    a, b = some_deltas(2)
    save_delta(a, tmp_path / "a")
    save_delta(b, tmp_path / "b")
    for found, expected in (
        (add(tmp_path / "a", str(tmp_path / "b")), add(a, b)),
        (negate(tmp_path / "a"), negate(a)),
        (scale(tmp_path / "a", 0.3), scale(a, 0.3)),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_refuses_another_anchor():
    a, b = some_deltas(2)
    b.meta = DeltaMeta("b" * 64, "other", "head")
    with pytest.raises(DeltaError, match="delta 1 belongs to another anchor"):
        add(a, b)


def test_refuses_nothing_lists_and_factors():
    (delta,) = some_deltas(1)
    with pytest.raises(ArgumentError, match="deltas is empty"):
        add()
    with pytest.raises(ArgumentError, match="must be a dict of tensors or a path, got a list"):
        add([delta])
    with pytest.raises(ArgumentError, match="must be a dict of tensors or a path, got a NoneType"):
        negate(None)
    for factor in (float("nan"), float("inf"), "2", None):
        with pytest.raises(ArgumentError, match="factor must be a finite number"):
            scale(delta, factor)
