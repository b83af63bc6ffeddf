"""Means, their errors over seeds and test images, and areas under ROC curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student


@dataclass(frozen=True)
class Mean:
    """A mean, its standard error (NaN for a single seed) and the error's degrees of freedom."""

    value: float
    error: float
    freedom: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Over seeds: the error is that of other seeds."""
        error = math.nan
        if len(values) > 1:
            error = statistics.stdev(values) / len(values) ** 0.5
        return cls(statistics.fmean(values), error, len(values) - 1)

    @classmethod
    def crossed(cls, values: np.ndarray) -> Mean:
        """Over seeds (rows) and test images (columns): of other seeds and other test images.

        The variance of the mean is that of the seeds' means over S and that of the images' means
        over I, less what both hold of their interaction (Searle, Casella, McCulloch, "Variance
        Components", 1992, ch. 4); its degrees of freedom are Satterthwaite's. No less than either
        alone.
        """
        seeds, images = values.shape
        mean = float(values.mean())
        if seeds < 2 or images < 2:
            return cls(mean, math.nan, 0)
        rows, columns = values.mean(axis=1), values.mean(axis=0)
        rest = values - rows[:, None] - columns + mean
        of_seeds = float(rows.var(ddof=1)) / seeds
        of_images = float(columns.var(ddof=1)) / images
        interaction = float((rest**2).sum()) / ((seeds - 1) * (images - 1)) / (seeds * images)
        variance = max(of_seeds + of_images - interaction, of_seeds, of_images)
        spread = of_seeds**2 / (seeds - 1) + of_images**2 / (images - 1)
        freedom = (of_seeds + of_images) ** 2 / spread if spread > 0 else math.inf
        return cls(mean, variance**0.5, freedom)

    @property
    def chance(self) -> float:
        """Two-sided probability of a mean as far from zero, were the true one zero (Student)."""
        if math.isnan(self.error):
            return 1.0
        if self.error == 0:
            return float(self.value == 0)
        return float(2 * student.sf(abs(self.value) / self.error, self.freedom))

    def percent(self) -> str:
        """As "71.3 ± 0.4"."""
        if math.isnan(self.error):
            return f"{100 * self.value:.1f}"
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f}"

    def points(self) -> str:
        """A difference, as "+1.2 ± 0.4"."""
        return f"{100 * self.value:+.1f} ± {100 * self.error:.1f}"


def listed(differences: Mapping[str, Mean]) -> str:
    """As "emoji +1.2 ± 0.4, mnist -0.3 ± 0.2"."""
    return ", ".join(f"{name} {difference.points()}" for name, difference in differences.items())


def spread(differences: Iterable[Mean]) -> str:
    """From the least to the largest, as "-6.2 to -3.9"."""
    values = sorted(100 * difference.value for difference in differences)
    first, last = f"{values[0]:+.1f}", f"{values[-1]:+.1f}"
    return first if first == last else f"{first} to {last}"


def paired(first: Sequence[float], second: Sequence[float]) -> Mean:
    """Of the differences seed by seed: both of a pair saw the same images."""
    return Mean.of([a - b for a, b in zip(first, second, strict=True)])


def gain(first: np.ndarray, second: np.ndarray) -> Mean:
    """Of the differences image by image, (S, I) each, of accuracies on the same test images."""
    if first.shape != second.shape:
        raise ValueError(f"seeds and images differ: {first.shape} and {second.shape}")
    return Mean.crossed(first - second)


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a member scores above another, ties by half."""
    ordered = np.sort(np.asarray(others))
    below = np.searchsorted(ordered, np.asarray(members), side="left")
    up_to = np.searchsorted(ordered, np.asarray(members), side="right")
    return float((below + up_to).mean() / (2 * len(ordered)))


def caught(members: ArrayLike, others: ArrayLike, rate: float) -> float:
    """True positive rate at a false positive rate."""
    threshold = np.quantile(np.asarray(others), 1 - rate)
    return float((np.asarray(members) > threshold).mean())
