"""A change is told from noise, on samples whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.verdict import CONFIDENCE, judge


def samples(seed: int, change: float, noise: float, rounds: int = 15) -> tuple:
    """Two commits' seconds: each round has its own mood, each call its own noise."""
    random = np.random.default_rng(seed)
    mood = random.lognormal(sigma=0.2, size=rounds)
    own = random.lognormal(sigma=noise, size=(2, rounds))
    return mood * own[0], mood * own[1] * change


@pytest.mark.parametrize(
    ("change", "word"), [(1.2, "slower"), (1 / 1.2, "faster"), (1.0, "same within noise")]
)
@pytest.mark.parametrize("seed", range(5))
def test_a_change_shows_through_the_moods_of_a_machine(change, word, seed) -> None:
    verdict = judge(*samples(seed, change, noise=0.02), tolerance=0.03)
    assert verdict.word == word
    assert verdict.lower < change * 1.02 and verdict.upper > change / 1.02


def test_a_change_within_the_tolerance_is_none() -> None:
    pair = samples(0, change=1.02, noise=1e-4)
    assert judge(*pair, tolerance=0.03).word == "same within noise"
    assert judge(*pair, tolerance=0.0).word == "slower"


def test_a_change_within_the_noise_is_none() -> None:
    assert judge(*samples(0, change=1.1, noise=0.5), tolerance=0.03).word == "same within noise"


def test_interrupted_calls_change_nothing() -> None:
    base, head = samples(0, change=1.0, noise=0.01)
    head[3:6] *= 10
    assert judge(base, head, tolerance=0.03).word == "same within noise"


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of a true ratio 1.1. A median's bootstrap errs on the wide side; 100 draws, ± 3 sigma."""
    verdicts = [judge(*samples(seed, 1.1, noise=0.1), tolerance=0.0) for seed in range(100)]
    held = sum(verdict.lower <= 1.1 <= verdict.upper for verdict in verdicts) / 100
    assert held > CONFIDENCE - 3 * np.sqrt(CONFIDENCE * (1 - CONFIDENCE) / 100)


def test_a_verdict_is_repeatable_and_its_ratio_is_that_of_the_medians() -> None:
    base, head = samples(0, change=1.5, noise=0.1)
    verdict = judge(base, head, tolerance=0.03)
    assert verdict == judge(list(base), list(head), tolerance=0.03)
    assert verdict.ratio == pytest.approx(np.median(head) / np.median(base))


@pytest.mark.parametrize("pair", [([1.0, 2.0], [1.0]), ([], [])])
def test_samples_that_are_no_pairs_are_refused(pair) -> None:
    with pytest.raises(ValueError, match="are no pairs"):
        judge(*pair, tolerance=0.03)
