"""Means, standard errors, paired differences and attack curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

BOOTSTRAPS = 2000
Z95 = 1.959964


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its standard error, NaN for a single seed."""

    value: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        error = math.nan
        if len(values) > 1:
            error = statistics.stdev(values) / len(values) ** 0.5
        return cls(statistics.fmean(values), error, len(values))

    def percent(self) -> str:
        """As "71.3 ± 0.4"."""
        if math.isnan(self.error):
            return f"{100 * self.value:.1f}"
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f}"


def paired(first: Sequence[float], second: Sequence[float]) -> Mean:
    """Of the differences seed by seed: both of a pair saw the same images."""
    return Mean.of([a - b for a, b in zip(first, second, strict=True)])


def beyond(difference: Mean, errors: float = 2.0) -> bool:
    """Whether a mean is above zero by more than so many standard errors."""
    return difference.value > errors * difference.error


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a member scores above another, ties by half."""
    ordered = np.sort(np.asarray(others))
    below = np.searchsorted(ordered, np.asarray(members), side="left")
    up_to = np.searchsorted(ordered, np.asarray(members), side="right")
    return float((below + up_to).mean() / (2 * len(ordered)))


def caught(members: ArrayLike, others: ArrayLike, rate: float) -> np.ndarray:
    """True positive rate at a false positive rate, of each row if there are several."""
    threshold = np.quantile(np.asarray(others), 1 - rate, axis=-1, keepdims=True)
    return (np.asarray(members) > threshold).mean(axis=-1)


@dataclass(frozen=True)
class Attack:
    """How well members are told from others: mean over seeds, and a 95 % interval."""

    auc: float
    low: float
    high: float
    caught: float
    caught_low: float
    caught_high: float


def attack(runs: Sequence[tuple[Sequence[float], Sequence[float]]], rate: float = 0.05) -> Attack:
    """Of the seeds' scores; the interval by resampling members and others within each seed.

    Args:
        runs: Of each seed, the scores of members and of others.
        rate: Of false positives, at which true ones are counted.
    """
    random = np.random.default_rng(0)
    arrays = [(np.asarray(members), np.asarray(others)) for members, others in runs]
    drawn = [
        [(random.choice(a, len(a)), random.choice(b, len(b))) for a, b in arrays]
        for _ in range(BOOTSTRAPS)
    ]
    areas = [np.mean([auc(a, b) for a, b in seeds]) for seeds in drawn]
    by_seed = [map(np.stack, zip(*pairs, strict=True)) for pairs in zip(*drawn, strict=True)]
    rates = np.mean([caught(members, others, rate) for members, others in by_seed], axis=0)
    low, high = np.quantile(areas, [0.025, 0.975])
    caught_low, caught_high = np.quantile(rates, [0.025, 0.975])
    return Attack(
        float(np.mean([auc(a, b) for a, b in arrays])),
        float(low),
        float(high),
        float(np.mean([caught(a, b, rate) for a, b in arrays])),
        float(caught_low),
        float(caught_high),
    )
