"""Statistics of the study, against scipy's and scikit-learn's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from studies.paper.report.claims import FAILS, HOLDS, OPEN, Claim, held, table
from studies.paper.report.summary import Mean, auc, caught, gain, paired


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_mean_and_its_standard_error(random: np.random.Generator) -> None:
    values = random.random(5).tolist()
    mean = Mean.of(values)
    assert mean.value == pytest.approx(np.mean(values))
    assert mean.error == pytest.approx(stats.sem(values))
    tested: Any = stats.ttest_1samp(values, 0.0)
    assert mean.chance == pytest.approx(tested.pvalue)
    assert Mean(0.71234, 0.0051, 4).percent() == "71.2 ± 0.5"
    assert Mean(-0.0123, 0.0051, 4).points() == "-1.2 ± 0.5"
    single = Mean.of([0.5])
    assert math.isnan(single.error) and single.percent() == "50.0"
    assert single.chance == 1.0  # of one seed nothing is beyond its error


def test_no_difference_at_all_has_no_chance_but_one() -> None:
    assert Mean(0.0, 0.0, 4).chance == 1.0
    assert Mean(0.1, 0.0, 4).chance == 0.0


def test_errors_hold_the_spread_of_seeds_and_of_images(random: np.random.Generator) -> None:
    """Against the spread of means over made-up seeds and images that are drawn again and again."""
    seeds, images, spread = 5, 40, (0.3, 0.5, 1.0)

    def drawn() -> np.ndarray:
        of_seed = spread[0] * random.normal(size=(seeds, 1))
        of_image = spread[1] * random.normal(size=(1, images))
        return of_seed + of_image + spread[2] * random.normal(size=(seeds, images))

    every = [Mean.crossed(drawn()) for _ in range(4000)]
    means = np.array([mean.value for mean in every])
    variances = np.array([mean.error**2 for mean in every])
    assert variances.mean() == pytest.approx(means.var(), rel=0.06)
    found = np.array([mean.chance < 0.05 for mean in every]).mean()
    assert 0.03 < found < 0.07  # there is no difference: one in twenty is found


def test_seeds_that_agree_leave_the_error_of_the_images(random: np.random.Generator) -> None:
    values = np.repeat(random.normal(size=(1, 50)), 5, axis=0)
    assert Mean.crossed(values).error == pytest.approx(stats.sem(values[0]))
    assert math.isnan(Mean.crossed(values[:1]).error)


def test_gains_are_paired_by_seed_and_image(random: np.random.Generator) -> None:
    first = random.integers(0, 2, (5, 30)).astype(float)
    second = first.copy()
    second[:, 0] = 1 - second[:, 0]
    assert gain(first, second).value == pytest.approx((first - second).mean())
    assert gain(first, first).error == 0.0
    with pytest.raises(ValueError, match="differ"):
        gain(first, second[:, 1:])


def test_paired_differences_do_without_what_pairs_share(random: np.random.Generator) -> None:
    shared, gain = random.random(6), 0.01 * random.random(6)
    difference = paired((shared + gain).tolist(), shared.tolist())
    assert difference.value == pytest.approx(gain.mean())
    assert difference.error == pytest.approx(stats.sem(gain))
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


def test_auc_is_scikit_learns(random: np.random.Generator) -> None:
    members = random.integers(0, 20, 50)  # ties
    others = random.integers(-5, 15, 70)
    truth = np.r_[np.ones(50), np.zeros(70)]
    assert auc(members, others) == pytest.approx(roc_auc_score(truth, np.r_[members, others]))


def test_caught_is_on_the_roc_curve(random: np.random.Generator) -> None:
    members, others = random.normal(1, 1, 400), random.normal(0, 1, 1000)
    truth = np.r_[np.ones(400), np.zeros(1000)]
    false, true, _ = roc_curve(truth, np.r_[members, others], drop_intermediate=False)
    assert caught(members, others, 0.05) == pytest.approx(np.interp(0.05, false, true), abs=0.01)


CRITICAL = float(stats.t.isf(0.025, 4))  # of five seeds


@pytest.mark.parametrize(
    ("value", "wanted", "verdict"),
    [
        (1.01, "higher", HOLDS),
        (0.99, "higher", OPEN),
        (-1.01, "higher", FAILS),
        (-0.99, "higher", OPEN),
        (-0.99, "not lower", HOLDS),
        (-1.01, "not lower", FAILS),
        (1.01, "not lower", HOLDS),
    ],
)
def test_verdicts(value: float, wanted: str, verdict: str) -> None:
    difference = Mean(value * CRITICAL / 100, 0.01, 4)
    claim = Claim("so it is", difference, wanted)  # type: ignore[arg-type]
    assert claim.verdict == verdict
    shown = f"{value * CRITICAL:+.1f} ± 1.0"
    assert f"| so it is | {shown} | {verdict} | {verdict} |" in table([claim])


def test_corrected_chances_are_holms(random: np.random.Generator) -> None:
    claims = [Claim("", Mean(x / 100, 0.01, 4), "higher") for x in random.normal(2, 2, 12)]
    chances = np.array([claim.difference.chance for claim in claims])
    # By its definition: the k-th smallest of m counts m - k + 1 times, and none less than before.
    expected = np.empty(12)
    for place, index in enumerate(np.argsort(chances)):
        before = [(12 - k) * chances[i] for k, i in enumerate(np.argsort(chances)[: place + 1])]
        expected[index] = min(1.0, max(before))
    assert [claim.chance for claim in held(claims)] == pytest.approx(expected.tolist())
    few = [Claim("", Mean(0.03, 0.01, 4), "higher")]
    many = [*few, *(Claim("", Mean(0.0, 0.01, 4), "higher") for _ in range(9))]
    assert (held(few)[0].verdict, held(many)[0].verdict) == (HOLDS, OPEN)
    assert many[0].verdict == HOLDS  # alone
