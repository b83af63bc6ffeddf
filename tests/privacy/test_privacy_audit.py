"""Audits of mechanisms simulated in numpy, whose trade-off is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from statements import a_statement

from tangent_ops.errors import ArgumentError, CertificateError, UnsupportedError
from tangent_ops.privacy.accounting import Phase, epsilon
from tangent_ops.privacy.auditing.audit import Audit, audit, rate_at_least, rate_at_most
from tangent_ops.privacy.auditing.trade_off import TradeOff, largest_noise, scaled

NORMAL = NormalDist()
DELTA = 1e-5


def mechanism(phase: Phase, seed: int, noise: float = 1.0, clip: float = 1.0):
    """The canary's own coordinate of DP-SGD: its clipped gradients and the noise, added up."""
    draw = np.random.default_rng(seed)

    def train(with_canary: bool, _: int) -> float:
        times = draw.binomial(phase.steps, phase.sample_rate) if with_canary else 0
        deviation = noise * phase.noise_multiplier * math.sqrt(phase.steps)
        return clip * times + deviation * draw.standard_normal()

    return train


def run(phase: Phase, runs: int, seed: int = 0, **wrong: float) -> Audit:
    return audit(mechanism(phase, seed, **wrong), a_statement(phase), runs=runs, progress=False)


@pytest.mark.parametrize("hits", [0, 1, 7, 30])
def test_rates_are_bounded_as_by_scipy(hits: int) -> None:
    both = binomtest(hits, 30).proportion_ci(confidence_level=0.94, method="exact")
    assert float(rate_at_least(hits, 30, 0.03)) == pytest.approx(both.low, abs=1e-12)
    assert float(rate_at_most(hits, 30, 0.03)) == pytest.approx(both.high, abs=1e-12)


def test_the_gaussian_trade_off_in_closed_form() -> None:
    phases = [Phase(2.0, 1.0, 3), Phase(1.5, 1.0, 1)]
    mu = math.sqrt(3 / 4 + 1 / 2.25)
    rates = [0.001, 0.2, 0.9]
    right = [NORMAL.cdf(NORMAL.inv_cdf(rate) + mu) for rate in rates]
    assert TradeOff(phases).power(rates) == pytest.approx(right, rel=1e-12)
    # PLD rounds up, by its grid.
    assert TradeOff(phases).epsilon(DELTA) == pytest.approx(epsilon(phases, DELTA), rel=1e-3)
    assert TradeOff(phases).epsilon(0.9) == 0


def test_the_trade_off_of_one_subsampled_step() -> None:
    sigma, rate = 0.8, 0.3
    curve = TradeOff([Phase(sigma, rate, 1)])
    for threshold in np.linspace(-1.5, 3, 30):
        fpr = NORMAL.cdf(-threshold / sigma)
        tpr = (1 - rate) * fpr + rate * NORMAL.cdf((1 - threshold) / sigma)
        assert curve.power(fpr) >= tpr - 1e-9
        # There e^ε > 1 is the slope, where adding a sample and removing one are the same.
        if threshold > 0.5:
            assert curve.power(fpr) == pytest.approx(tpr, rel=2e-3)
            # An attacker may want to show either case, so the curve is its own mirror image.
            assert curve.power(1 - tpr) == pytest.approx(1 - fpr, rel=2e-3)


def test_the_trade_off_of_composed_phases() -> None:
    """Against the likelihood ratio test, simulated."""
    phases, count = [Phase(1.0, 0.5, 4), Phase(1.2, 1.0, 1)], 400_000
    draw = np.random.default_rng(0)

    def ratios(inside: bool) -> np.ndarray:
        """Of the log-likelihood, up to a constant."""
        total = np.zeros(count)
        for phase in phases:
            for _ in range(phase.steps):
                there = (draw.random(count) < phase.sample_rate) & inside
                x = there + phase.noise_multiplier * draw.standard_normal(count)
                ratio = np.exp((x - 0.5) / phase.noise_multiplier**2)
                total += np.log(1 - phase.sample_rate + phase.sample_rate * ratio)
        return total

    inside, outside = ratios(True), ratios(False)
    for fpr in (0.01, 0.05, 0.2):
        tpr = float((inside > np.quantile(outside, 1 - fpr)).mean())
        # Three deviations of the quantile and of the rate; slopes are below 12 here.
        slack = 3 * (12 * math.sqrt(fpr / count) + math.sqrt(tpr / count))
        assert abs(float(TradeOff(phases).power(fpr)) - tpr) <= min(slack, 0.03)


def test_the_noise_of_an_attack_in_closed_form() -> None:
    claim = [Phase(2.0, 1.0, 4)]  # mu = 1
    for fpr, tpr in ((0.1, 0.8), (0.4, 0.5), (0.01, 0.99)):
        right = 1 / (NORMAL.inv_cdf(tpr) - NORMAL.inv_cdf(fpr))
        found = largest_noise(claim, fpr, tpr)
        assert found is not None and right <= found <= right * 1.002
    assert largest_noise(claim, 0.3, 0.3) is None


def test_the_noise_of_an_attack_with_subsampling() -> None:
    claim = [Phase(1.0, 0.5, 2)]
    found = largest_noise(claim, 0.1, 0.6)
    assert found is not None
    assert float(TradeOff(scaled(claim, found)).power(0.1)) < 0.6
    assert float(TradeOff(scaled(claim, found / 1.003)).power(0.1)) > 0.6
    # In one run of four the canary is in no batch: no noise at all would not be enough.
    assert largest_noise(claim, 0.001, 0.99) == 1 / 64


def test_no_bound_exceeds_the_truth_more_often_than_stated() -> None:
    phase, audits = Phase(1.0, 1.0, 1), 300
    truth = epsilon([phase], DELTA)
    found = [run(phase, 200, seed) for seed in range(audits)]
    wrong = sum(not one.consistent for one in found)
    assert wrong == sum(one.family_lower_bound > truth for one in found)
    assert max(one.lower_bound for one in found) <= truth
    # A rate of 5 % at most: as many as 26 of 300 would come by chance once in a hundred.
    assert wrong <= 26
    # The bounds are not weak: some audit comes near to being wrong.
    assert max(one.family_lower_bound for one in found) > 0.8 * truth


def test_a_sharp_attack_shows_most_of_epsilon() -> None:
    for phase in (Phase(1.0, 1.0, 1), Phase(1.0, 0.5, 5)):
        found = run(phase, 10_000)
        assert found.consistent
        assert 0.7 * found.claimed <= found.family_lower_bound <= found.claimed
        assert 0 < found.lower_bound <= found.family_lower_bound
        assert found.noise_ratio is not None and 1 <= found.noise_ratio <= 1.3


@pytest.mark.parametrize("wrong", [{"noise": 0.5}, {"clip": 10.0}], ids=["noise", "clip"])
@pytest.mark.parametrize("phase", [Phase(1.0, 1.0, 1), Phase(1.0, 0.5, 5)], ids=["all", "sampled"])
def test_a_broken_mechanism_is_refuted(phase: Phase, wrong: dict[str, float]) -> None:
    found = run(phase, 1000, **wrong)
    assert not found.consistent
    assert found.family_lower_bound > found.claimed
    assert found.noise_ratio is not None and found.noise_ratio < 0.95
    assert "refuted" in str(found)


def test_a_perfect_attack_by_hand() -> None:
    found = audit(
        lambda with_canary, _: torch.tensor([3.0]) if with_canary else 1,
        a_statement(Phase(10.0, 1.0, 1)),
        runs=80,
        confidence=0.9,
        progress=False,
    )
    rare = 1 - 0.05 ** (1 / 30)  # none of 30, three quarters of 40
    assert (found.runs, found.counted, found.tpr, found.fpr) == (80, 30, 1, 0)
    assert found.fpr_high == pytest.approx(rare, rel=1e-9)
    assert found.tpr_low == pytest.approx(1 - rare, rel=1e-9)
    assert found.lower_bound == pytest.approx(math.log((1 - rare - DELTA) / rare), rel=1e-9)
    assert found.most_provable == pytest.approx(found.lower_bound, rel=1e-9)
    assert found.threshold == 2
    mu = 2 * NORMAL.inv_cdf(1 - rare)
    assert found.noise_ratio == pytest.approx(0.1 / mu, rel=2e-3)
    assert found.family_lower_bound == pytest.approx(
        epsilon([Phase(1 / mu, 1.0, 1)], DELTA), rel=3e-3
    )
    assert not found.consistent


@pytest.mark.parametrize("score", [lambda *_: 1.0, lambda inside, _: -float(inside)])
def test_a_useless_attack_shows_nothing(score) -> None:
    found = audit(score, a_statement(), runs=40, progress=False)
    assert found.consistent and found.noise_ratio is None
    assert (found.lower_bound, found.family_lower_bound) == (0, 0)


def test_runs_that_chose_the_threshold_are_not_counted() -> None:
    def train(with_canary: bool, run: int) -> float:
        return float(with_canary) if run < 20 else 0.0

    found = audit(train, a_statement(), runs=80, progress=False)
    assert (found.counted, found.tpr, found.fpr) == (30, 0, 0)


def test_each_run_is_asked_for_once_half_of_them_with_the_canary() -> None:
    asked = []
    audit(lambda *of: asked.append(of) or 0, a_statement(), runs=42, progress=False)
    assert sorted(run for _, run in asked) == [*range(42)]
    assert sum(with_canary for with_canary, _ in asked) == 21


def test_an_audit_as_json_and_in_words() -> None:
    found = run(Phase(1.0, 1.0, 1), 40)
    assert Audit(**json.loads(found.to_json())) == found
    assert "The claim stands" in str(found) and "4.377" in str(found)


BAD_AUDITS = {
    "train must be a function": {"train": 3},
    "claim must be a PrivacyStatement, got a float": {"claim": 3.0},
    "runs must be an integer of at least 40, got 38": {"runs": 38},
    "runs must be even, as half of them have the canary; got 41": {"runs": 41},
    "confidence must be between 0 and 1, got 95": {"confidence": 95},
    "train returned nan in run 0": {"train": lambda *_: math.nan},
    "train must return one number, got None in run 0": {"train": lambda *_: None},
    "train must return one number, got tensor": {"train": lambda *_: torch.ones(2)},
    "claim promises nothing: its epsilon is inf at delta 1e-05": {
        "claim": a_statement(Phase(0.0, 1.0, 1))
    },
}


@pytest.mark.parametrize(("message", "wrong"), BAD_AUDITS.items(), ids=BAD_AUDITS)
def test_bad_arguments_are_refused(message: str, wrong: dict) -> None:
    good = {"train": lambda *_: 0.0, "claim": a_statement(), "progress": False}
    with pytest.raises(ArgumentError, match=message):
        audit(**{**good, **wrong})


def test_other_claims_are_refused() -> None:
    claim = a_statement()
    with pytest.raises(UnsupportedError, match="another adjacency: 'replace one sample'"):
        audit(lambda *_: 0.0, replace(claim, adjacency="replace one sample"))
    with pytest.raises(CertificateError, match="claims epsilon"):
        audit(lambda *_: 0.0, replace(claim, epsilon=claim.epsilon / 2))
