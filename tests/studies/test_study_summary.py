"""Statistics of the study, against scipy's and scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from studies.paper.report.claims import FAILS, HOLDS, OPEN, Claim, not_held, table
from studies.paper.report.summary import Mean, attack, auc, beyond, caught, paired


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_mean_and_its_standard_error(random: np.random.Generator) -> None:
    values = random.random(5).tolist()
    mean = Mean.of(values)
    assert mean.value == pytest.approx(np.mean(values))
    assert mean.error == pytest.approx(stats.sem(values))
    assert Mean(0.71234, 0.0051, 5).percent() == "71.2 ± 0.5"
    single = Mean.of([0.5])
    assert math.isnan(single.error) and single.percent() == "50.0"
    assert not beyond(single)  # of one seed nothing is beyond its error


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


def test_an_attack_at_chance_covers_chance_and_another_does_not(
    random: np.random.Generator,
) -> None:
    chance = [(random.normal(size=80), random.normal(size=300)) for _ in range(4)]
    seen = attack(chance)  # type: ignore[arg-type]
    assert seen.low < 0.5 < seen.high
    assert seen.low < seen.auc < seen.high
    good = attack([(members + 1, others) for members, others in chance])  # type: ignore
    assert good.low > 0.6
    assert good.caught > 0.15 > seen.caught


@pytest.mark.parametrize(
    ("value", "error", "wanted", "verdict"),
    [
        (1.0, 0.4, "higher", HOLDS),
        (1.0, 0.6, "higher", OPEN),
        (-1.0, 0.4, "higher", FAILS),
        (-1.0, 0.6, "higher", OPEN),
        (-1.0, 0.6, "not lower", HOLDS),
        (-1.0, 0.4, "not lower", FAILS),
        (0.0, 0.0, "not lower", HOLDS),
        (0.0, 0.0, "higher", OPEN),
    ],
)
def test_verdicts(value: float, error: float, wanted: str, verdict: str) -> None:
    claim = Claim("so it is", Mean(value / 100, error / 100, 5), wanted, "because")  # type: ignore
    assert claim.verdict == verdict
    assert f"| so it is | {value:+.1f} ± {error:.1f} | {verdict} |" in table([claim])
    assert ("because" in not_held([claim])) == (verdict != HOLDS)
