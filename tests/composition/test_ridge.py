"""Optima and what chooses among them against dense least squares of all rows, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_oracle import Samples, flat, make_samples

from tangent_ops.composition.ridge import Ridge
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.errors import ArgumentError, StatisticsError

L2 = 0.2
NO_CORE_OR_HEAD = pytest.mark.parametrize("sizes", [{}, {"core": 0}, {"width": 0}], ids=str)


def dense(samples: Samples, l2: float) -> tuple[torch.Tensor, torch.Tensor]:
    """J as (n C, P), and H + λ I."""
    jacobian = samples.jacobian().flatten(0, 1)
    penalty = l2 * len(jacobian) / 2
    eye = torch.eye(jacobian.shape[1], dtype=torch.float64)
    return jacobian, jacobian.T @ jacobian + penalty * eye


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 12),
    core=st.integers(0, 7),
    outputs=st.integers(1, 4),
    width=st.integers(0, 5),
    l2=st.sampled_from([0.05, 1.0, 20.0]),
    weighted=st.booleans(),
)
def test_the_solution_is_that_of_dense_least_squares(
    count: int, core: int, outputs: int, width: int, l2: float, weighted: bool
) -> None:
    samples = make_samples(count, core, outputs, width, seed=count)
    weights = torch.linspace(0.5, 2.0, outputs) if weighted else None
    found = samples.statistics(weights=weights).solve(l2)
    exact = samples.optimum(l2, weights)
    assert float((flat(found) - exact).norm()) <= 1e-10 * float(exact.norm())
    assert found.meta == samples.meta.delta
    if not weighted:
        left = samples.residuals - samples.jacobian() @ exact
        assert found.loss == pytest.approx(float(left.square().mean()), abs=1e-9)


def test_the_path_has_the_exact_effective_dimension_and_validation() -> None:
    samples = make_samples(11)
    l2s = [0.01, 0.3, 5.0]
    rows = samples.statistics().solve_path(l2s)
    for row, l2 in zip(rows, l2s, strict=True):
        jacobian, matrix = dense(samples, l2)
        hat = jacobian @ torch.linalg.solve(matrix, jacobian.T)
        right = samples.residuals.flatten()
        left = right - hat @ right
        assert row.delta.l2 == l2
        exact = torch.linalg.solve(matrix, jacobian.T @ right)
        torch.testing.assert_close(flat(row.delta), exact, rtol=1e-9, atol=1e-10)
        assert row.delta.loss == pytest.approx(float(left.square().mean()), rel=1e-9)
        assert row.effective_dimension == pytest.approx(float(hat.trace()), rel=1e-9)
        free = 1 - float(hat.trace()) / len(left)
        assert row.gcv == pytest.approx(float(left.square().mean()) / free**2, rel=1e-7)
        values = torch.linalg.eigvalsh(matrix)
        assert 0.8 <= row.delta.condition * float(values[0] / values[-1]) <= 1 + 1e-9


def test_the_least_validation_is_chosen() -> None:
    statistics = make_samples(11).statistics()
    rows = statistics.solve_path([0.03, 0.3, 3.0])
    best = min(rows, key=lambda row: row.gcv)
    found = statistics.choose([3.0, 0.03, 0.3])
    assert (found.delta.l2, found.gcv) == (best.delta.l2, best.gcv)
    assert statistics.choose().gcv <= min(row.gcv for row in statistics.solve_path([0.1, 1.0]))


def test_terms_too_coarse_for_the_features_are_refused() -> None:
    """Features of 1e-4, whose squares are below the unit of 2^-24."""
    fine = make_samples(30, bits=52)
    fine.rows.core.mul_(1e-4)
    fine.rows.head.mul_(1e-4)
    coarse = replace(fine, meta=replace(fine.meta, fraction_bits=24))
    for l2 in (1e-9, 1e-6, 1e-3):
        exact = fine.optimum(l2)
        found = fine.statistics().solve(l2)
        assert float((flat(found) - exact).norm()) <= 1e-4 * float(exact.norm())
    with pytest.raises(StatisticsError, match=r"2\^-24 are too coarse: .* more fraction_bits"):
        coarse.statistics().solve(1e-9)
    assert coarse.statistics().choose([1e-9, 1.0]).delta.l2 == 1.0
    with pytest.raises(StatisticsError, match="too coarse"):
        coarse.statistics().choose([1e-9])


def test_penalties_that_float64_cannot_take_are_passed_over() -> None:
    few = make_samples(2).statistics()
    assert few.choose([0.0, 1e-14, 0.5]).delta.l2 == 0.5
    with pytest.raises(StatisticsError, match="l2=0, 2 samples"):
        few.choose([0.0])


@NO_CORE_OR_HEAD
def test_leave_one_out_is_the_fit_without_the_sample(sizes: dict[str, int]) -> None:
    samples = make_samples(7, **sizes)
    whole = samples.statistics()
    found = Ridge(whole).leave_one_out(samples.rows, samples.residuals, L2)
    jacobian = samples.jacobian()
    for index in range(7):
        others = samples.take([other for other in range(7) if other != index])
        exact = samples.residuals[index] - jacobian[index] @ others.optimum(L2)
        torch.testing.assert_close(found[index], exact, rtol=1e-9, atol=1e-9)
        without = (whole - samples.take([index]).statistics()).solve(L2)
        torch.testing.assert_close(flat(without), others.optimum(L2), rtol=1e-9, atol=1e-9)


@NO_CORE_OR_HEAD
def test_changes_are_those_of_fits_without_each_sample(sizes: dict[str, int]) -> None:
    samples, others = make_samples(9, **sizes), make_samples(4, seed=5, **sizes)
    found = Ridge(samples.statistics()).changes(samples.rows, samples.residuals, others.rows, L2)
    full = others.jacobian() @ samples.optimum(L2)
    for index in range(9):
        rest = samples.take([one for one in range(9) if one != index])
        expected = others.jacobian() @ rest.optimum(L2) - full
        torch.testing.assert_close(found[index], expected, rtol=1e-7, atol=1e-8)


@NO_CORE_OR_HEAD
def test_predictions_and_covariances_are_those_of_the_dense_problem(sizes: dict[str, int]) -> None:
    samples, new = make_samples(9, **sizes), make_samples(4, seed=5, **sizes)
    ridge = Ridge(samples.statistics())
    _, matrix = dense(samples, L2)
    jacobian = new.jacobian()
    exact = new.rows.outputs + jacobian @ samples.optimum(L2)
    torch.testing.assert_close(ridge.predictions(new.rows, L2), exact, rtol=1e-9, atol=1e-9)
    expected = jacobian @ torch.linalg.solve(matrix, jacobian.mT)
    found = ridge.covariance(new.rows, L2, 1.7)
    torch.testing.assert_close(found, 1.7 * expected, rtol=1e-9, atol=1e-9)
    noise = samples.statistics().solve(L2).loss
    torch.testing.assert_close(ridge.covariance(new.rows, L2), noise * expected)


def test_too_many_columns_without_a_penalty_are_hopeless() -> None:
    samples = make_samples(2)
    with pytest.raises(StatisticsError, match=r"l2=0, 2 samples .* use a larger l2"):
        samples.statistics().solve(0.0)
    with pytest.raises(StatisticsError, match=r"condition number of about .* use a larger l2"):
        samples.statistics().solve(3e-14)
    enough = make_samples(40)
    torch.testing.assert_close(flat(enough.statistics().solve(0.0)), enough.optimum(0.0))


@pytest.mark.parametrize("l2", [-1.0, math.nan, math.inf])
def test_a_wrong_l2_is_refused(l2: float) -> None:
    with pytest.raises(ArgumentError, match="l2"):
        make_samples(3).statistics().solve(l2)


def test_what_cannot_be_solved_is_refused() -> None:
    samples = make_samples(3)
    with pytest.raises(StatisticsError, match="no sample"):
        TangentStatistics.zero(samples.meta).solve(1.0)
    with pytest.raises(ArgumentError, match="l2s is empty"):
        samples.statistics().solve_path([])
    one = samples.take([0])
    with pytest.raises(StatisticsError, match="leave-one-out needs two samples"):
        Ridge(one.statistics()).leave_one_out(one.rows, one.residuals, 1.0)
