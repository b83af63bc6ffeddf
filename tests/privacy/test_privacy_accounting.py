"""Accounting against closed forms, a simulation and published figures."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from gaussian_oracle import gaussian_epsilon, gaussian_failure
from scipy.optimize import brentq
from scipy.stats import norm

from tangent_ops.errors import ArgumentError
from tangent_ops.privacy.accounting import Phase, epsilon, failure, noise_multiplier_for


def one_step_failure(sigma: float, rate: float, epsilon: float) -> float:
    """Hockey-stick divergence of one subsampled step, both ways, by its likelihood's threshold."""

    def loss(x: float) -> float:
        return math.log(1 - rate + rate * math.exp((2 * x - 1) / (2 * sigma**2)))

    def above(x: float) -> float:
        return (1 - rate) * norm.sf(x, 0, sigma) + rate * norm.sf(x, 1, sigma)

    reach = 60 * sigma
    start = brentq(lambda x: loss(x) - epsilon, -reach, reach)
    removed = above(start) - math.exp(epsilon) * norm.sf(start, 0, sigma)
    added = 0.0
    if -epsilon > math.log(1 - rate):
        end = brentq(lambda x: loss(x) + epsilon, -reach, reach)
        added = norm.cdf(end, 0, sigma) - math.exp(epsilon) * (1 - above(end))
    return max(removed, added)


def test_published_figures() -> None:
    # Abadi et al.'s example, as in the documentation of TensorFlow Privacy and Opacus.
    phases = [Phase(4, 0.01, 10_000)]
    assert epsilon(phases, 1e-5, "rdp") == pytest.approx(1.0355, abs=1e-4)
    assert epsilon(phases, 1e-5, "pld") == pytest.approx(0.947, abs=1e-3)
    assert epsilon(phases, 1e-5, "prv") == pytest.approx(0.957, abs=1e-3)


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize(("sigma", "steps"), [(0.3, 1), (1, 1), (4, 1), (4, 100), (1000, 100)])
def test_gaussian_mechanism(sigma: float, steps: int, delta: float) -> None:
    mu = math.sqrt(steps) / sigma
    exact = gaussian_epsilon(mu, delta)
    found = epsilon([Phase(sigma, 1, steps)], delta)
    assert exact - 1e-12 <= found <= exact * 1.001 + 1e-7
    assert gaussian_failure(mu, exact) <= failure([Phase(sigma, 1, steps)], exact) * (1 + 1e-9)
    for accountant in ("prv", "rdp"):
        assert epsilon([Phase(sigma, 1, steps)], delta, accountant) >= exact


def test_phases_compose_to_a_gaussian_mechanism() -> None:
    phases = [Phase(2, 1, 3), Phase(0.5, 1, 1), Phase(7, 1, 10)]
    mu = math.sqrt(3 / 4 + 4 + 10 / 49)
    assert epsilon(phases, 1e-6) == pytest.approx(gaussian_epsilon(mu, 1e-6), rel=1e-6)
    # Its estimate is within 0.1% here, and its bound as much above.
    assert 1 <= epsilon(phases, 1e-6, "prv") / gaussian_epsilon(mu, 1e-6) <= 1.002


@pytest.mark.parametrize(("sigma", "rate"), [(1, 0.25), (0.5, 0.01), (2, 0.7), (10, 0.5)])
def test_one_subsampled_step(sigma: float, rate: float) -> None:
    phases = [Phase(sigma, rate, 1)]
    for target in (0.01, 0.1, 0.3, 1.0):
        exact = one_step_failure(sigma, rate, target)
        assert exact - 1e-14 <= failure(phases, target) <= exact * 1.002 + 1e-12
        if exact > 1e-9:
            assert epsilon(phases, exact) == pytest.approx(target, rel=2e-3)


def test_two_phases_against_a_simulation_of_their_loss() -> None:
    phases = [Phase(1.2, 0.2, 10), Phase(2.0, 0.5, 5)]
    draws = np.random.default_rng(0)
    loss = np.zeros(400_000)
    for phase in phases:
        shape = (phase.steps, loss.size)
        x = phase.noise_multiplier * draws.standard_normal(shape)
        x += draws.random(shape) < phase.sample_rate
        ratio = np.exp((2 * x - 1) / (2 * phase.noise_multiplier**2))
        loss += np.log1p(phase.sample_rate * (ratio - 1)).sum(0)
    for target in (0.5, 2.0, 4.0):
        terms = np.maximum(0, -np.expm1(target - loss))
        spread = 5 * terms.std() / math.sqrt(loss.size)
        assert failure(phases, target) == pytest.approx(terms.mean(), abs=spread)


@pytest.mark.parametrize(("sigma", "rate"), [(100, 0.01), (200, 0.001)])
def test_many_small_steps(sigma: float, rate: float) -> None:
    # The central limit (Bu, Dong, Long, Su, "Deep learning with Gaussian differential privacy",
    # 2020) is within 0.1% here; a grid of 1e-4 is 9% and 400% above.
    mu = rate * math.sqrt(100_000 * math.expm1(sigma**-2))
    found = epsilon([Phase(sigma, rate, 100_000)], 1e-5)
    assert found == pytest.approx(gaussian_epsilon(mu, 1e-5), rel=2e-3)


@pytest.mark.parametrize("delta", [1e-11, 3e-12])
def test_rounding_is_on_the_safe_side(delta: float) -> None:
    # Nearly every sample is in each step: almost the Gaussian mechanism, composed by a transform.
    phases = [Phase(100, 1 - 1e-13, 10_000)]
    exact = gaussian_epsilon(1, delta)
    assert exact <= epsilon(phases, delta) <= 1.03 * exact  # without the margin 0.03% below
    assert failure(phases, exact) >= delta


def test_delta_below_the_rounding_is_not_claimed() -> None:
    assert epsilon([Phase(4, 0.01, 10_000)], 1e-12) == math.inf
    assert failure([Phase(4, 0.01, 10_000)], 100) >= 10_000 * 2.2e-16


def test_large_epsilons() -> None:
    exact = gaussian_epsilon(20, 1e-9)  # 310
    assert exact <= epsilon([Phase(0.5, 1, 100)], 1e-9) <= exact * (1 + 1e-6)
    # Opacus' own answer is 702 here, and dp-accounting's 1333.
    for phase in (Phase(0.02, 1e-4, 3), Phase(0.3, 1, 100), Phase(1, 0.5, 4000)):
        for accountant in ("pld", "prv", "rdp"):
            assert epsilon([phase], 1e-5, accountant) == math.inf
    exact = gaussian_epsilon(100 / 3, 1e-9)  # 755
    assert 1e-9 <= failure([Phase(0.3, 1, 100)], exact) <= 1.01e-9


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
@pytest.mark.parametrize("sigma", [0, 0.009])
def test_without_noise_nothing_is_promised(sigma: float, accountant: str) -> None:
    phases = [Phase(4, 0.01, 10), Phase(sigma, 0.01, 10)]
    assert epsilon(phases, 1e-5, accountant) == math.inf
    assert failure(phases, 1e3) == 1


def test_much_noise_is_never_below_zero() -> None:
    for accountant in ("pld", "prv", "rdp"):
        assert 0 <= epsilon([Phase(50, 0.1, 10)], 0.9, accountant) <= 0.02


def test_accountants_are_quiet(caplog: pytest.LogCaptureFixture, capsys) -> None:
    with caplog.at_level(logging.WARNING):
        for accountant in ("pld", "prv", "rdp"):
            epsilon([Phase(1, 0.25, 100)], 1e-5, accountant)
            epsilon([Phase(200, 0.001, 10)], 1e-5, accountant)
    assert caplog.records == [] and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("target", "delta"), [(0.1, 1e-5), (1, 1e-5), (8, 1e-7)])
def test_noise_for_an_epsilon(target: float, delta: float) -> None:
    sigma = noise_multiplier_for(target, delta, sample_rate=1, steps=5)
    mu = math.sqrt(5) / sigma
    assert target * 0.997 <= gaussian_epsilon(mu, delta) <= target
    sigma = noise_multiplier_for(target, delta, sample_rate=0.02, steps=500)
    assert epsilon([Phase(sigma, 0.02, 500)], delta) <= target
    assert epsilon([Phase(sigma * 0.998, 0.02, 500)], delta) > target


def test_noise_after_phases_before() -> None:
    before = [Phase(3, 1, 1)]
    sigma = noise_multiplier_for(2, 1e-5, sample_rate=1, steps=1, before=before)
    mu = math.hypot(1 / 3, 1 / sigma)
    assert 2 * 0.997 <= gaussian_epsilon(mu, 1e-5) <= 2
    with pytest.raises(ArgumentError, match=r"leaves nothing .* before take 1\.2"):
        noise_multiplier_for(1, 1e-5, sample_rate=1, steps=1, before=before)


REFUSED = {
    "noise_multiplier must be .* -1": lambda: Phase(-1, 0.1, 1),
    "noise_multiplier must be .* nan": lambda: Phase(math.nan, 0.1, 1),
    "noise_multiplier must be .* inf": lambda: Phase(math.inf, 0.1, 1),
    "noise_multiplier must be .* '1'": lambda: Phase("1", 0.1, 1),
    r"sample_rate must be in \(0, 1\], got 0": lambda: Phase(1, 0, 1),
    r"sample_rate must be in \(0, 1\], got 1.5": lambda: Phase(1, 1.5, 1),
    "steps must be a positive int, got 0": lambda: Phase(1, 0.1, 0),
    "steps must be a positive int, got 1.0": lambda: Phase(1, 0.1, 1.0),
    "steps must be a positive int, got True": lambda: Phase(1, 0.1, True),
    "got one Phase: use a list": lambda: epsilon(Phase(1, 1, 1), 1e-5),
    r"phases must be .* got \(\)": lambda: epsilon([], 1e-5),
    r"phases must be .* got \(3,\)": lambda: failure([3], 1),
    "delta must be .* got 0": lambda: epsilon([Phase(1, 1, 1)], 0),
    "delta must be .* got 1e-13": lambda: epsilon([Phase(1, 1, 1)], 1e-13),
    "delta must be .* got 1:": lambda: epsilon([Phase(1, 1, 1)], 1),
    "accountant must be .* 'gdp'": lambda: epsilon([Phase(1, 1, 1)], 1e-5, "gdp"),
    "epsilon must be .* -1": lambda: failure([Phase(1, 1, 1)], -1),
    "epsilon must be .* nan": lambda: failure([Phase(1, 1, 1)], math.nan),
    "epsilon must be a positive number, got 0": lambda: noise_multiplier_for(
        0, 1e-5, sample_rate=1, steps=1
    ),
    "sample_rate must": lambda: noise_multiplier_for(1, 1e-5, sample_rate=2, steps=1),
    "cannot be reached": lambda: noise_multiplier_for(1, 1e-12, sample_rate=0.1, steps=10_000),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused(message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        REFUSED[message]()
