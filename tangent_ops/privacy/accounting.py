"""Epsilon and delta of compositions of Poisson-subsampled Gaussian mechanisms.

Adjacency is adding or removing one sample. There are three accountants:

- ``"pld"``: dp-accounting's privacy loss distribution (Koskela, Jälkö, Honkela, AISTATS 2020;
  Doroshenko et al., "Connect the dots", PoPETs 2022). It rounds up; statements claim its value.
- ``"prv"``: Opacus' accountant (Gopi, Lee, Wutschitz, "Numerical composition of differential
  privacy", NeurIPS 2021). The value is its upper bound, with an allowed error of 0.01, or 0.1% of
  the PLD value if that is more.
- ``"rdp"``: dp-accounting's Rényi accountant (Mironov, Talwar, Zhang, 2019). Looser.
"""

from __future__ import annotations

import logging
import math
import numbers
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant

from tangent_ops.data import check_choice
from tangent_ops.errors import ArgumentError

ACCOUNTANTS = ("pld", "prv", "rdp")
SMALLEST_DELTA = 1e-12  # below, the rounding of float64 dominates
SMALLEST_NOISE = 0.01  # below, one step's loss exceeds 5,000, too much for the accountants
LARGEST_EPSILON = 500.0  # above, e^loss nearly overflows float64: accountants are wrong or slow
PRECISION = 1e-3  # of `noise_multiplier_for`, relative

_VARIANCE = 2e-4  # relative; what rounding to the grid may add to the privacy loss's variance


@dataclass(frozen=True)
class Phase:
    """`steps` compositions of one Poisson-subsampled Gaussian mechanism.

    A Gaussian mechanism of mu-GDP is ``Phase(1 / mu, 1.0, 1)``.

    Attributes:
        noise_multiplier: sigma, the noise's standard deviation over the sensitivity; 0 for none.
        sample_rate: q in (0, 1], each sample's chance to be in a step; 1 for every sample.
        steps: T >= 1.

    Raises:
        ArgumentError: an attribute is out of range, or of another type.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        sigma, rate = self.noise_multiplier, self.sample_rate
        if not (_is_number(sigma) and 0 <= sigma < math.inf):
            raise ArgumentError(f"noise_multiplier must be a number of 0 or more, got {sigma!r}")
        if not (_is_number(rate) and 0 < rate <= 1):
            raise ArgumentError(
                f"sample_rate must be in (0, 1], got {rate!r}: batch size over number of samples"
            )
        if type(self.steps) is not int or self.steps < 1:
            raise ArgumentError(f"steps must be a positive int, got {self.steps!r}")
        object.__setattr__(self, "noise_multiplier", float(sigma))  # JSON knows no numpy
        object.__setattr__(self, "sample_rate", float(rate))


def epsilon(phases: Sequence[Phase], delta: float, accountant: str = "pld") -> float:
    """The epsilon for which the phases, one after the other, are (epsilon, delta)-private.

    Args:
        phases: what is composed, on the same samples.
        delta: from 1e-12 to 1, exclusive.
        accountant: "pld", "prv" or "rdp".

    Returns:
        An upper bound. inf if it exceeds 500, if a noise multiplier is below 0.01, or, for "pld"
        and "prv", if float64 does not resolve `delta`: rounding is assumed to be up to 2.2e-16 for
        each subsampled step. "prv" also gives inf where `delta` is too small for Opacus' grid.

    Raises:
        ArgumentError: an argument is out of range, or of another type.
    """
    phases = check_phases(phases)
    check_delta(delta)
    check_choice("accountant", accountant, ACCOUNTANTS)
    if _is_bare(phases):
        return math.inf
    if accountant == "rdp":
        return _rdp(phases, delta)
    bound = _pld(phases, delta)
    return bound if accountant == "pld" else _prv(phases, delta, bound)


def failure(phases: Sequence[Phase], epsilon: float) -> float:
    """The delta for which the phases are (epsilon, delta)-private, by PLD.

    Args:
        phases: what is composed, on the same samples.
        epsilon: 0 or more.

    Returns:
        An upper bound, in [0, 1].

    Raises:
        ArgumentError: an argument is out of range, or of another type.
    """
    phases = check_phases(phases)
    if not (_is_number(epsilon) and epsilon >= 0):
        raise ArgumentError(f"epsilon must be a number of 0 or more, got {epsilon!r}")
    if _is_bare(phases):
        return 1.0
    return min(1.0, max(0.0, float(_losses(phases).get_delta(epsilon))) + _rounding(phases))


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    *,
    sample_rate: float,
    steps: int,
    before: Sequence[Phase] = (),
) -> float:
    """The smallest noise of a last phase that makes all phases (epsilon, delta)-private, by PLD.

    Args:
        epsilon: the target; positive.
        delta: from 1e-12 to 1, exclusive.
        sample_rate: of the last phase.
        steps: of the last phase.
        before: earlier phases on the same samples.

    Returns:
        sigma, at most 0.1% above the smallest; the returned value itself was accounted for.

    Raises:
        ArgumentError: an argument is out of range or of another type; `before` alone reaches
            epsilon; accounting does not resolve the target.
    """
    if not (_is_number(epsilon) and 0 < epsilon < math.inf):
        raise ArgumentError(f"epsilon must be a positive number, got {epsilon!r}")
    check_delta(delta)
    Phase(1.0, sample_rate, steps)
    before = check_phases(before) if before else ()
    spent = _pld(before, delta) if before else 0.0
    if spent >= epsilon:
        raise ArgumentError(
            f"epsilon {epsilon:g} at delta {delta:g} leaves nothing for this phase: the phases "
            f"before take {spent:.4g}. Give a larger epsilon, or more noise in those"
        )

    def fits(sigma: float) -> bool:
        return _pld((*before, Phase(sigma, sample_rate, steps)), delta) <= epsilon

    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, 2 * high
        if high > 1e9:
            raise ArgumentError(
                f"epsilon {epsilon:g} at delta {delta:g} cannot be reached: accounting in float64 "
                "does not resolve it. Give a larger epsilon or delta"
            )
    # `high` always fits and is returned, so the result holds even if `fits` is not monotone.
    while high - low > PRECISION * high:
        middle = math.sqrt(low * high) if low else high / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def check_delta(delta: float) -> None:
    """Raise ArgumentError unless delta is from `SMALLEST_DELTA` to 1, exclusive."""
    if not (_is_number(delta) and SMALLEST_DELTA <= delta < 1):
        raise ArgumentError(
            f"delta must be from {SMALLEST_DELTA:g} to 1, got {delta!r}: values below one over the "
            "number of samples are usual"
        )


def check_phases(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """Give the phases as a tuple; raise ArgumentError unless they are one `Phase` or more."""
    if isinstance(phases, Phase):
        raise ArgumentError("phases must be several, got one Phase: use a list")
    phases = tuple(phases)
    if not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise ArgumentError(f"phases must be a list of Phase, at least one, got {phases!r}")
    return phases


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_bare(phases: tuple[Phase, ...]) -> bool:
    return any(phase.noise_multiplier < SMALLEST_NOISE for phase in phases)


@lru_cache(maxsize=256)
def _pld(phases: tuple[Phase, ...], delta: float) -> float:
    if _is_bare(phases) or delta <= _rounding(phases):
        return math.inf
    with np.errstate(all="ignore"):  # losses far above LARGEST_EPSILON overflow
        return _bound(float(_losses(phases).get_epsilon(delta - _rounding(phases))))


def _bound(epsilon: float) -> float:
    return max(0.0, epsilon) if epsilon <= LARGEST_EPSILON else math.inf


def _rounding(phases: tuple[Phase, ...]) -> float:
    """Of delta: each subsampled step multiplies a Fourier transform, with float64's rounding."""
    return float(np.finfo(np.float64).eps) * sum(p.steps for p in phases if p.sample_rate < 1)


@lru_cache(maxsize=16)
def _losses(phases: tuple[Phase, ...]) -> PLDAccountant:
    accountant = PLDAccountant(value_discretization_interval=_interval(phases))
    _compose(accountant, phases)
    return accountant


def _compose(accountant: PLDAccountant | RdpAccountant, phases: tuple[Phase, ...]) -> None:
    # Gaussian mechanisms compose to a Gaussian one (Dong, Roth, Su, 2022, corollary 3.3).
    mu = math.sqrt(sum(p.steps / p.noise_multiplier**2 for p in phases if p.sample_rate == 1))
    if mu:
        accountant.compose(GaussianDpEvent(1 / mu))
    for phase in phases:
        if phase.sample_rate < 1:
            event = GaussianDpEvent(phase.noise_multiplier)
            accountant.compose(PoissonSampledDpEvent(phase.sample_rate, event), phase.steps)


def _interval(phases: tuple[Phase, ...]) -> float:
    """The grid's spacing: fine compared with one step's privacy loss, not finer than epsilon needs.

    Rounding to a grid of spacing h that keeps the mean of e^-loss adds a variance of h²/6 in each
    step. A poor spacing makes the bound looser or its computation slower, never the bound wrong.
    """
    steps, variance, reach = 0, 0.0, 0.0
    for phase in phases:
        rate, noise = phase.sample_rate, phase.noise_multiplier
        divergence = rate**2 * math.expm1(min(noise**-2, 50.0))  # chi-square, of one step
        largest = 1 / noise + 1 / (2 * noise**2)  # about; of a step with the sample
        variance += phase.steps * min(divergence, rate * largest**2)
        reach += phase.steps * min(divergence, rate * largest) / 2 + largest
        steps += 1 if rate == 1 else phase.steps
    fine = math.sqrt(6 * _VARIANCE * variance / steps)
    return min(fine, max(1e-3, 1e-5 * (reach + 6 * math.sqrt(variance))))


@lru_cache(maxsize=64)  # Opacus takes about a second
def _prv(phases: tuple[Phase, ...], delta: float, pld: float) -> float:
    if math.isinf(pld):
        return math.inf
    accountant = PRVAccountant()
    accountant.history = [(p.noise_multiplier, p.sample_rate, p.steps) for p in phases]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is the")  # about its grid's size
        try:
            bound = float(accountant.get_epsilon(delta, eps_error=max(0.01, 1e-3 * pld)))
        except (RuntimeError, ValueError, IndexError):  # its grid does not fit delta
            return math.inf
    return _bound(bound)


def _rdp(phases: tuple[Phase, ...], delta: float) -> float:
    accountant = RdpAccountant()
    with _quiet("absl"):  # it logs which orders it leaves out; the bound holds without them
        _compose(accountant, phases)
        return _bound(float(accountant.get_epsilon(delta)))


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
