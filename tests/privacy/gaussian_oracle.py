"""The Gaussian mechanism in closed form."""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import log_ndtr


def gaussian_failure(mu: float, epsilon: float) -> float:
    """Balle, Wang, "Improving the Gaussian mechanism", ICML 2018, theorem 5; logs for size."""
    first = log_ndtr(mu / 2 - epsilon / mu)
    return math.exp(first) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))


def gaussian_epsilon(mu: float, delta: float) -> float:
    if gaussian_failure(mu, 0) <= delta:
        return 0.0
    return brentq(lambda e: gaussian_failure(mu, e) - delta, 0, mu**2 + 60 * mu, xtol=1e-14)
