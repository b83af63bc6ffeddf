"""Weighted sums of deltas: values, meta, memory, and what is refused."""

import dataclasses
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_deltas import random_deltas
from refusals import refused
from small_models import tiny_vit

import tangent_ops
from tangent_ops.composition.compose import compose
from tangent_ops.delta import Delta, DeltaMeta
from tangent_ops.errors import ArgumentError, DeltaError, DeltaFileError

META = DeltaMeta("a" * 64, "tiny", "head", loss="square", shard="0", extra={"note": "x"})


def some_deltas(count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"head.weight": (3, 4), "head.bias": (3,), "scale": ()}
    return [
        Delta(
            {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()},
            dataclasses.replace(META, shard=str(index)),
        )
        for index in range(count)
    ]


def oracle(deltas, weights):
    """The sum in numpy's float64."""
    return {
        name: np.sum(
            [w * d[name].double().numpy() for d, w in zip(deltas, weights, strict=True)], axis=0
        )
        for name in deltas[0]
    }


# The sum


@given(
    weights=st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_is_the_weighted_sum_rounded_once(weights, dtype, seed):
    deltas = some_deltas(len(weights), dtype, seed)
    found, expected = compose(deltas, weights), oracle(deltas, weights)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == dtype
        # Fused multiply-adds may change float64's last bit, and so which way it is rounded.
        exact = torch.as_tensor(value, dtype=torch.float64)
        assert ((exact - 1e-13).to(dtype) <= found[name]).all()
        assert (found[name] <= (exact + 1e-13).to(dtype)).all()


@given(count=st.integers(1, 7), seed=st.integers(0, 2**16))
@settings(max_examples=15, deadline=None)
def test_default_is_the_mean(count, seed):
    deltas = some_deltas(count, torch.float64, seed)
    expected = oracle(deltas, [1 / count] * count)
    for name, value in compose(deltas).items():
        assert np.allclose(value.numpy(), expected[name], rtol=0, atol=1e-14)


@given(data=st.data(), count=st.integers(2, 6))
@settings(max_examples=15, deadline=None)
def test_the_order_does_not_matter(data, count):
    deltas = some_deltas(count, torch.float64)
    weights = [0.5 * k - 1 for k in range(count)]
    order = data.draw(st.permutations(range(count)))
    one = compose(deltas, weights)
    other = compose([deltas[i] for i in order], [weights[i] for i in order])
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize("weights", [None, [1.0], [-1.0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_delta_comes_back_bit_for_bit(weights, dtype):
    (delta,) = some_deltas(1, dtype)
    delta["head.bias"][:2] = torch.tensor([-0.0, 0.0])
    found = compose([delta], weights)
    for name, value in delta.items():
        expected = -value if weights == [-1.0] else value
        assert found[name].dtype == dtype
        assert torch.equal(found[name].signbit(), expected.signbit())
        assert torch.equal(found[name], expected)
        assert found[name].data_ptr() != value.data_ptr()


def test_small_terms_are_not_lost_among_large_ones():
    big, small = torch.tensor([1e8]), torch.tensor([1.0])
    found = compose([{"w": big}, {"w": small}, {"w": big}], [1, 1, -1])
    assert found["w"].item() == 1.0  # float32 would give 0


def test_inputs_are_left_alone():
    deltas = some_deltas(3)
    before = [{name: value.clone() for name, value in delta.items()} for delta in deltas]
    compose(deltas, [1, 2, 3])
    for delta, old in zip(deltas, before, strict=True):
        assert all(torch.equal(delta[name], old[name]) for name in old)


def test_weights_may_be_numbers_of_any_kind():
    deltas = some_deltas(2)
    expected = compose(deltas, [0.25, 0.75])
    for weights in (np.array([0.25, 0.75]), torch.tensor([0.25, 0.75]), (1 / 4, 3 / 4)):
        found = compose(deltas, weights)  # pyright: ignore[reportArgumentType]
        assert all(torch.equal(found[name], expected[name]) for name in expected)


# With the model


@pytest.fixture(scope="module")
def tangent():
    model = tiny_vit()
    return tangent_ops.linearize(model.double(), tangent_ops.last_blocks(model, 1))


def test_composing_deltas_composes_outputs(tangent):
    torch.manual_seed(1)
    images, weights = torch.randn(3, 3, 16, 16, dtype=torch.float64), [0.7, -1.3, 2.0]
    deltas = random_deltas(tangent, 3, 0.1)
    primal = tangent.anchor(images)
    expected = primal.clone()
    with torch.no_grad():
        for weight, delta in zip(weights, deltas, strict=True):
            tangent.load_delta_dict(delta)
            expected += weight * tangent.primal_and_tangent(images)[1]
        tangent.load_delta_dict(compose(deltas, weights))
        found = tangent(images)
    assert (found - primal).abs().max() > 1e-3  # the deltas do something
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_forgetting_is_composing_the_rest(tangent, saved):
    """The mean over K with shard s taken out is (K mean - delta_s) / (K - 1)."""
    deltas = random_deltas(tangent, 4, 0.1)
    paths = saved(deltas)
    mean, rest = compose(paths), compose(path for path in paths if path != paths[2])
    for name in mean:
        expected = (4 * mean[name] - deltas[2][name]) / 3
        assert torch.allclose(rest[name], expected, rtol=0, atol=1e-14)
    last = compose(paths[3:])
    assert all(torch.equal(last[name], deltas[3][name]) for name in last)


# One at a time


def test_only_one_delta_is_alive_at_a_time():
    alive = weakref.WeakSet()

    def one_by_one():
        for index in range(5):
            assert len(alive) == 0, f"an earlier delta is alive when {index} is asked for"
            (delta,) = some_deltas(1, seed=index)
            alive.add(delta["head.weight"])
            # Not a local of this generator any more when it goes on.
            box = [delta]
            del delta
            yield box.pop()

    found = compose(one_by_one())
    expected = oracle([some_deltas(1, seed=index)[0] for index in range(5)], [0.2] * 5)
    assert np.allclose(found["head.weight"].numpy(), expected["head.weight"], atol=1e-6)


def test_paths_are_opened_one_by_one(saved, opened):
    deltas = some_deltas(4)
    paths = [str(path) for path in saved(deltas)]
    found = compose(iter(paths))
    assert opened == paths
    assert torch.equal(found["head.weight"], compose(deltas)["head.weight"])


# Meta


def test_the_composition_keeps_what_the_deltas_share():
    meta = compose(some_deltas(3)).meta
    assert meta == DeltaMeta("a" * 64, "tiny", "head", loss="square")


def test_different_losses_are_not_kept():
    deltas = some_deltas(3)
    assert deltas[1].meta is not None
    deltas[1].meta = dataclasses.replace(deltas[1].meta, loss="cross entropy")
    meta = compose(deltas).meta
    assert meta is not None and meta.loss is None


@pytest.mark.parametrize("plain", [0, 1, 2])
def test_a_delta_of_unknown_origin_makes_the_origin_unknown(plain):
    deltas = some_deltas(3)
    deltas[plain].meta = None
    assert compose(deltas).meta is None


# What is refused


@pytest.mark.parametrize("weights", [None, []])
def test_refuses_nothing(weights):
    refused(ArgumentError, "deltas is empty", compose, [], weights)


@pytest.mark.parametrize("one", [some_deltas(1)[0], "shard.safetensors"])
def test_refuses_one_delta_outside_a_list(one):
    refused(ArgumentError, "use a list", compose, one)


@pytest.mark.parametrize("items", [[1], [None], [("a", torch.ones(1))]])
def test_refuses_what_is_no_delta(items):
    refused(ArgumentError, "delta 0 must be a dict of tensors or a path", compose, items)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for more than 1 deltas"),
        ([1.0, 2.0, 3.0], "3 weights for 2 deltas"),
        ([], "0 weights for more than 0 deltas"),
        ([1.0, float("nan")], "must be finite"),
        ([float("inf"), 1.0], "must be finite"),
        (0.5, "one per delta, got 0.5"),
        (["half", "half"], "must be numbers"),
    ],
)
def test_refuses_weights(weights, message):
    refused(ArgumentError, message, compose, some_deltas(2), weights)


def test_refuses_another_anchor():
    deltas = some_deltas(3)
    deltas[2].meta = DeltaMeta("b" * 64, "other", "head")
    with pytest.raises(
        DeltaError, match=r"delta 2 .*another anchor: b{12} \(other\), expected a{12} \(tiny\)"
    ):
        compose(deltas)


def test_an_unknown_anchor_between_does_not_hide_another():
    deltas = some_deltas(3)
    deltas[1].meta = None
    deltas[2].meta = DeltaMeta("b" * 64, "other", "head")
    refused(DeltaError, "another anchor", compose, deltas)
    refused(DeltaError, "another anchor", compose, [deltas[1], deltas[0], deltas[2]])


def test_refuses_other_names_shapes_and_dtypes():
    first, second = some_deltas(2)
    renamed = Delta(second, second.meta)
    renamed["head.offset"] = renamed.pop("head.bias")
    with pytest.raises(DeltaError, match=r"delta 1 .*missing head\.bias; unexpected head\.offset"):
        compose([first, renamed])
    with pytest.raises(DeltaError, match=r"head\.bias has shape \(1,\), expected \(3,\)"):
        compose([first, second | {"head.bias": torch.ones(1)}])
    with pytest.raises(DeltaError, match=r"head\.bias is torch\.float64, the first's torch\.flo"):
        compose([first, second | {"head.bias": torch.ones(3, dtype=torch.float64)}])


def test_refuses_values_that_are_not_finite():
    first, second = some_deltas(2)
    second["scale"] = torch.tensor(float("nan"))
    refused(DeltaError, "delta 1 has values that are not finite in scale", compose, [first, second])
    large = {"w": torch.tensor([6e4], dtype=torch.float16)}
    with pytest.raises(DeltaError, match="the composition has values that are not finite in w"):
        compose([large, large], [1, 1])


def test_a_damaged_file_is_refused(saved):
    (path,) = saved(some_deltas(1))
    path.write_bytes(path.read_bytes()[:-1])
    refused(DeltaFileError, path.name, compose, [path])
