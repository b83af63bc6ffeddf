"""Sums of statistics: bit for bit, whatever the order, after additions and removals."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_oracle import make_samples

from tangent_ops.composition.fixed_terms import add_samples
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.errors import StatisticsError


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 12),
    core=st.integers(0, 7),
    outputs=st.integers(1, 4),
    width=st.integers(0, 5),
    groups=st.integers(1, 12),
    single=st.booleans(),
    weighted=st.booleans(),
    draws=st.randoms(use_true_random=False),
)
def test_any_order_any_groups_and_any_removals_give_the_same_bits(
    count: int,
    core: int,
    outputs: int,
    width: int,
    groups: int,
    single: bool,
    weighted: bool,
    draws: random.Random,
) -> None:
    dtype = torch.float32 if single else torch.float64
    samples = make_samples(count, core, outputs, width, dtype=dtype, seed=draws.randrange(99))
    weights = torch.rand(outputs) + 0.1 if weighted else None
    whole = samples.statistics(count, weights)
    order = list(range(count))
    draws.shuffle(order)
    assert samples.take(order).statistics(groups, weights) == whole
    cut = draws.randrange(count + 1)
    first = samples.take(order[:cut]).statistics(groups, weights)
    second = samples.take(order[cut:]).statistics(groups, weights)
    for total in (first + second, second + first):
        assert total == whole
        assert torch.equal(total.digests, whole.digests)  # type: ignore[arg-type]
    assert whole - second == first
    assert torch.equal((whole - second).digests, first.digests)  # type: ignore[arg-type]
    assert whole - whole == TangentStatistics.zero(samples.meta)


def test_the_terms_are_the_exact_sums_within_half_a_unit_for_each_sample() -> None:
    samples = make_samples(30, bits=20)
    jacobian, r = samples.jacobian().flatten(0, 1), samples.residuals.flatten()
    found, k = samples.statistics(7), 5
    scale = 2.0**-20
    exact = jacobian.T @ jacobian
    head = found.terms["head_head"].double() * scale
    assert (found.terms["core_core"].double() * scale - exact[:k, :k]).abs().max() <= 15.1 * scale
    cross = found.terms["core_head"].double().flatten(1) * scale
    assert (cross - exact[:k, k:]).abs().max() <= 15.1 * scale
    assert (torch.block_diag(head, head, head) - exact[k:, k:]).abs().max() <= 15.1 * scale
    right = jacobian.T @ r
    terms = torch.cat([found.terms["core_residual"], found.terms["head_residual"].flatten()])
    assert (terms.double() * scale - right).abs().max() <= 15.1 * scale
    square = float(found.terms["residual_residual"]) * scale
    assert abs(square - float(r @ r)) <= 15.1 * scale
    assert found.counts.tolist() == [10, 10, 10]


def test_reach_bounds_every_term_of_every_sample() -> None:
    samples = make_samples(9)
    total = 0
    for index in range(9):
        alone = samples.take([index]).statistics()
        assert alone.reach >= max(int(term.abs().max()) for term in alone.terms.values())
        total += alone.reach
    assert samples.statistics(4).reach == total


def test_large_terms_are_summed_exactly_beyond_the_integers_of_float64() -> None:
    samples = make_samples(6, bits=54)
    whole = samples.statistics(6)
    assert max(int(term.abs().max()) for term in whole.terms.values()) > 2**53
    alone = [samples.take([index]).statistics() for index in range(6)]
    for name, term in whole.terms.items():
        assert torch.equal(term, sum(one.terms[name] for one in alone))


def test_copies_of_a_sample_are_taken_out_one_by_one() -> None:
    samples = make_samples(4)
    one = samples.take([1]).statistics()
    twice = samples.statistics() + one
    assert twice - one == samples.statistics()
    with pytest.raises(StatisticsError, match="1 of the 1 samples to take out are not among the 3"):
        _ = twice - one - one - one


def test_samples_that_differ_in_one_bit_are_not_taken_out() -> None:
    samples = make_samples(5)
    whole = samples.statistics()
    other = samples.take([2])
    other.residuals[0, 0] = torch.nextafter(other.residuals[0, 0], torch.tensor(9.0).double())
    with pytest.raises(StatisticsError, match="are not among the 5, bit for bit"):
        _ = whole - other.statistics()


def test_without_a_list_only_counts_and_range_are_checked() -> None:
    samples = make_samples(5)
    whole, one = samples.statistics().without_list(), samples.take([3]).statistics()
    assert whole.nbytes < samples.statistics().nbytes
    assert whole - one == samples.take([0, 1, 2, 4]).statistics()
    with pytest.raises(StatisticsError, match="5 samples cannot be taken out of 1"):
        _ = one.without_list() - samples.statistics()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"delta": {"anchor": "c" * 64}}, "another anchor: 'cccc"),
        ({"delta": {"basis": "c" * 64}}, "another basis"),
        ({"delta": {"loss": "other"}}, "another loss: 'other'"),
        ({"classes": ("x", "y", "z")}, "another list of classes"),
        ({"class_weights": (1.0, 2.0, 1.0)}, "another set of class weights"),
        ({"fraction_bits": 30}, "another number of fraction bits: 30, not 48"),
        ({"delta": {"trainable": "head"}}, "another name of the model or pattern"),
    ],
)
def test_other_statistics_are_refused_by_name(change: dict, named: str) -> None:
    samples = make_samples(3)
    own = {**change}
    if "delta" in own:
        own["delta"] = replace(samples.meta.delta, **own["delta"])
    other = replace(samples, meta=replace(samples.meta, **own)).statistics()
    for operation in (samples.statistics().__add__, samples.statistics().__sub__):
        with pytest.raises(StatisticsError, match=named):
            operation(other)


def test_another_layout_and_other_kinds_are_refused() -> None:
    with pytest.raises(StatisticsError, match="another layout"):
        _ = make_samples(3).statistics() + make_samples(3, core=4).statistics()
    with pytest.raises(StatisticsError, match="expected TangentStatistics, got a int"):
        _ = make_samples(3).statistics() + 1  # type: ignore[operator]


@pytest.mark.parametrize("field", ["core", "head", "residuals"])
def test_values_that_are_not_finite_are_refused_and_nothing_is_added(field: str) -> None:
    samples = make_samples(3)
    value = samples.residuals if field == "residuals" else getattr(samples.rows, field)
    value[1].view(-1)[0] = float("nan")
    total = TangentStatistics.zero(samples.meta)
    with pytest.raises(StatisticsError, match="not finite"):
        add_samples(total, samples.rows, samples.residuals, samples.labels)
    assert total == TangentStatistics.zero(samples.meta)


def test_a_range_that_would_overflow_is_refused_and_nothing_is_added() -> None:
    samples = make_samples(4, bits=58)
    total = TangentStatistics.zero(samples.meta)
    with pytest.raises(StatisticsError, match=r"Use fewer fraction_bits, such as 50"):
        add_samples(total, samples.rows, samples.residuals, samples.labels)
    assert total == TangentStatistics.zero(samples.meta)
    sum_of = make_samples(1, bits=56).statistics()
    with pytest.raises(StatisticsError, match="the sum is out of range"):
        for _ in range(7):
            sum_of = sum_of + sum_of


def test_tensors_of_a_file_give_the_same_statistics() -> None:
    whole = make_samples(8).statistics()
    for one in (whole, whole.without_list()):
        tensors, metadata = one.to_tensors()
        assert "digests" in tensors or one.digests is None
        again = TangentStatistics.from_tensors(tensors, metadata)
        assert again == one
        assert (again.digests is None) == (one.digests is None)


def test_tensors_of_another_shape_or_dtype_are_refused() -> None:
    whole = make_samples(3).statistics()
    terms = {**whole.terms, "core_core": whole.terms["core_core"].double()}
    with pytest.raises(StatisticsError, match=r"core_core is torch.float64 of \(5, 5\)"):
        TangentStatistics(whole.meta, terms, whole.counts, whole.reach)
    del terms["core_core"]
    with pytest.raises(StatisticsError, match="core_core is missing"):
        TangentStatistics(whole.meta, terms, whole.counts, whole.reach)
