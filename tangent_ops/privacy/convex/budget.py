"""How much noise one Gaussian release of all samples needs."""

from __future__ import annotations

import math

from tangent_ops.errors import ArgumentError
from tangent_ops.privacy.accounting import noise_multiplier_for


def release_noise(
    samples: int, delta: float, target_epsilon: float | None, noise_multiplier: float | None
) -> float:
    """Standard deviation over sensitivity: as given, or the least that keeps the target.

    Raises:
        ArgumentError: delta is not below 1/N; not one of the two is given; one is out of range.
    """
    if not 0 < delta < 1 / samples:
        raise ArgumentError(
            f"delta must be above 0 and below 1/N = {1 / samples:.3g}, got {delta}: publishing one "
            "sample whole, drawn at random, has a delta of 1/N"
        )
    if (target_epsilon is None) == (noise_multiplier is None):
        raise ArgumentError("give one of target_epsilon and noise_multiplier, and not both")
    if target_epsilon is not None:
        return noise_multiplier_for(target_epsilon, delta, sample_rate=1.0, steps=1)
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):  # pyright: ignore
        raise ArgumentError(f"noise_multiplier must be positive and finite, got {noise_multiplier}")
    return float(noise_multiplier)  # pyright: ignore[reportArgumentType]
