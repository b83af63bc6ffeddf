"""`TradeOff`: the rates of true and false positives that a mechanism allows an attacker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

from tangent_ops.privacy.accounting import Phase

_EPSILONS = np.linspace(0, 16, 321)  # e^-16: fewer false positives than any audit can count
_FLOOR = 1 / 64  # of the claimed noise: less is as good as none
_TOLERANCE = 1e-3  # of a noise multiplier, relative


class TradeOff:
    """The largest rate of true positives at each rate of false positives, for composed phases.

    If every sample is in every step, it is the Gaussian curve Φ(Φ⁻¹(FPR) + μ) with
    μ = sqrt(Σ T / σ²) (Dong, Roth, Su, "Gaussian differential privacy", JRSS-B 2022, corollary 2.1
    and theorem 3.2). Otherwise, with δ(ε) by the privacy loss distribution,

        TPR <= e^ε FPR + δ(ε)    and    1 - FPR <= e^ε (1 - TPR) + δ(ε)    for every ε

    (Wasserman, Zhou, "A statistical framework for differential privacy", 2010, theorem 2.4;
    proposition 2.12 of the former), on a grid of ε. Rounding only allows larger rates.

    Args:
        phases: what is composed, each with noise.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        self._mu = self._losses = None
        if all(phase.sample_rate == 1 for phase in phases):
            self._mu = math.sqrt(sum(phase.steps / phase.noise_multiplier**2 for phase in phases))
        else:
            self._losses = _losses(phases)
            found = [self._losses.get_delta_for_epsilon(float(epsilon)) for epsilon in _EPSILONS]
            self._deltas = np.array(found)

    def power(self, fpr: ArrayLike) -> np.ndarray:
        """The largest rates of true positives at rates of false positives of any shape."""
        fpr = np.asarray(fpr, dtype=float)
        if self._mu is not None:
            return ndtr(ndtri(fpr) + self._mu)
        growth, rate = np.exp(_EPSILONS), fpr[..., None]
        by_positives = (growth * rate + self._deltas).min(axis=-1)
        by_negatives = (1 - (1 - rate - self._deltas) / growth).min(axis=-1)
        return np.minimum(np.minimum(by_positives, by_negatives), 1.0)

    def epsilon(self, delta: float) -> float:
        """The ε at a δ."""
        if self._losses is not None:
            return float(self._losses.get_epsilon_for_delta(delta))
        return _gaussian_epsilon(self._mu or 0.0, delta)


def scaled(phases: Sequence[Phase], factor: float) -> list[Phase]:
    """The same phases with `factor` times the noise."""
    return [replace(phase, noise_multiplier=factor * phase.noise_multiplier) for phase in phases]


def largest_noise(phases: Sequence[Phase], fpr: float, tpr: float) -> float | None:
    """The largest factor on all noise that still allows an attacker's rates.

    Rounded up by at most 0.1 %, and never below 1/64.

    Args:
        phases: the mechanism's.
        fpr: the attacker's rate of false positives.
        tpr: the attacker's rate of true positives.

    Returns:
        The factor; None if guessing does as well, or a thousand times the noise allows the rates.
    """
    if tpr <= fpr:
        return None

    def allows(factor: float) -> bool:
        return bool(TradeOff(scaled(phases, factor)).power(fpr) >= tpr)

    allowed = refused = 1.0
    if allows(1.0):
        while allows(refused := 2 * allowed):
            allowed = refused
            if allowed > 1000:
                return None
    else:
        while not allows(allowed := refused / 2):
            refused = allowed
            if refused <= _FLOOR:
                return refused
    while refused > allowed * (1 + _TOLERANCE):
        middle = math.sqrt(allowed * refused)
        if allows(middle):
            allowed = middle
        else:
            refused = middle
    return refused


def _losses(phases: Sequence[Phase]) -> PrivacyLossDistribution:
    """The distribution of the composed privacy loss, rounded pessimistically."""
    # Fine compared with one step's loss, as rounding adds up over the steps; not below 1e-4, as a
    # finer grid takes seconds where the noise is small.
    interval = max(1e-4, min(_deviation(phase) for phase in phases) / 300)
    parts = [
        privacy_loss_distribution.from_gaussian_mechanism(
            phase.noise_multiplier,
            sampling_prob=phase.sample_rate,
            value_discretization_interval=interval,
        ).self_compose(phase.steps)
        for phase in phases
    ]
    composed, *others = parts
    for other in others:
        composed = composed.compose(other)
    return composed


def _deviation(phase: Phase) -> float:
    """About the standard deviation of one step's privacy loss: sqrt(log(1 + χ²))."""
    squared = phase.noise_multiplier**-2
    if squared > 100:  # exp would overflow
        return math.sqrt(max(squared + 2 * math.log(phase.sample_rate), 1.0))
    return math.sqrt(math.log1p(phase.sample_rate**2 * math.expm1(squared)))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """ε of a Gaussian mechanism.

    Source: Balle, Wang, "Improving the Gaussian mechanism", ICML 2018, theorem 8.
    """

    def excess(epsilon: float) -> float:
        lower = math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))
        return float(ndtr(mu / 2 - epsilon / mu)) - lower - delta

    if mu == 0 or excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    root: Any = brentq(excess, 0.0, high, xtol=1e-12 * high)
    return float(root)
