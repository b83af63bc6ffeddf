"""`audit`: attacks a private training, and compares the attack's success with the claim."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import ndtri
from scipy.stats import beta
from torch import Tensor
from tqdm import tqdm

from tangent_ops.data import check_integer
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.privacy.accounting import Phase
from tangent_ops.privacy.auditing.trade_off import TradeOff, largest_noise, scaled
from tangent_ops.privacy.statement import ADD_OR_REMOVE, PrivacyStatement

Train = Callable[[bool, int], float | Tensor]

LEAST_RUNS = 40
_CHOOSING = 4  # one run in four chooses the threshold; the others are counted


@dataclass(frozen=True)
class Audit:
    """The success of an attacker who knows everything but the noise and whether the canary is in.

    All bounds hold together with the stated confidence, over the randomness of the runs.

    Attributes:
        consistent: whether the claim allows the bounds on the rates; if not, it is refuted.
        lower_bound: lower bound on ε at `delta` for any mechanism: the larger of
            log((TPR - δ) / FPR) and log((TNR - δ) / FNR), from the bounds on these rates.
        family_lower_bound: lower bound on ε at `delta` if the training is the claimed mechanism
            with another amount of noise (Nasr et al., "Tight auditing of differentially private
            machine learning", USENIX Security 2023): tight, unlike `lower_bound`.
        noise_ratio: upper bound on the noise in that case, in units of the claimed noise, and not
            below 1/64; None if the runs do not bound it.
        claimed: the claim's ε at `delta`.
        delta: δ.
        confidence: between 0 and 1.
        runs: trainings, half of them with the canary.
        counted: the counted runs of each half; the others chose the threshold.
        tpr: fraction of the counted runs with the canary whose score is above the threshold.
        fpr: the same fraction of the counted runs without the canary.
        tpr_low: Clopper-Pearson lower bound on the true rate.
        fpr_high: Clopper-Pearson upper bound on the true rate.
        threshold: of the scores.
    """

    consistent: bool
    lower_bound: float
    family_lower_bound: float
    noise_ratio: float | None
    claimed: float
    delta: float
    confidence: float
    runs: int
    counted: int
    tpr: float
    fpr: float
    tpr_low: float
    fpr_high: float
    threshold: float

    @property
    def most_provable(self) -> float:
        """The `lower_bound` of a perfect attack with as many runs."""
        rare = float(rate_at_most(0, self.counted, (1 - self.confidence) / 2))
        return _lower_bound(1 - rare, rare, self.delta)

    def to_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    def __str__(self) -> str:
        sure = f"{self.confidence:.4g}"
        lines = [
            f"claimed:        ε = {self.claimed:.4g} at δ = {self.delta:.3g}",
            f"lower bound:    ε >= {self.family_lower_bound:.4g} if it is the claimed mechanism "
            "with another amount of noise",
            f"                ε >= {self.lower_bound:.4g} whatever it is; {self.counted} + "
            f"{self.counted} runs can show {self.most_provable:.4g} at most",
            f"attack:         true positives {self.tpr:.4g} (at least {self.tpr_low:.4g}), "
            f"false positives {self.fpr:.4g} (at most {self.fpr_high:.4g})",
            f"confidence:     {sure}, over {self.runs} trainings, half of them with the canary",
        ]
        if self.noise_ratio is not None:
            lines.insert(3, f"noise:          at most {self.noise_ratio:.3g} times the claimed")
        if self.consistent:
            verdict = (
                "The claim stands: this attack does no better than the claim allows. This does not "
                "prove the claim; another attack, or more runs, could still refute it."
            )
        else:
            verdict = (
                f"The claim is refuted at confidence {sure}: this attack does better than the "
                "claimed noise and clipping allow. Do not publish what was trained like this."
            )
        return "\n".join([*lines, verdict])


def audit(
    train: Train,
    claim: PrivacyStatement,
    *,
    runs: int = 400,
    confidence: float = 0.95,
    progress: bool = True,
) -> Audit:
    """Train many times with and without one sample, the canary, and guess which runs had it.

    The attacker guesses "with" if the score is above a threshold. One run in four chooses the
    threshold; the others are counted, with exact binomial bounds on both rates (Clopper, Pearson,
    Biometrika 1934), each wrong with probability (1 - confidence) / 2 at most. The claim is refuted
    if its phases' trade-off curve does not allow these bounds (Nasr et al., USENIX Security 2023),
    which is sharper than comparing ε at one δ. A sound training is refuted with probability
    1 - confidence at most. A weak attack refutes nothing: choose a canary and a score for which the
    training's own bounds hold with equality.

    Args:
        train: (with_canary, run) -> the attacker's score, a finite number that is larger if the
            canary seems to be in. The calls train independently: seed each with `run`, which no two
            calls share, or do not seed it.
        claim: the statement that is claimed for the training with the canary.
        runs: trainings in all, even; half of them have the canary.
        confidence: between 0 and 1.
        progress: show a progress bar.

    Returns:
        The rates, the bounds, and whether the claim stands.

    Raises:
        ArgumentError: an invalid argument; a score that is no finite number.
        UnsupportedError: the claim is for another adjacency than adding or removing a sample.
        CertificateError: the claim's ε is less than its own phases give.
    """
    check_runs(runs, confidence)
    _check(train, claim)
    scores: dict[bool, list[float]] = {True: [], False: []}
    for run in tqdm(range(runs), "audit", unit="run", leave=False, disable=not progress):
        with_canary = run % 2 == 0
        scores[with_canary].append(_score(train(with_canary, run), run))

    alpha = (1 - confidence) / 2
    allowed = TradeOff(claim.phases)
    inside, outside = np.array(scores[True]), np.array(scores[False])
    choosing = len(inside) // _CHOOSING
    counted = len(inside) - choosing
    threshold = _threshold(inside[:choosing], outside[:choosing], counted, alpha, allowed)
    hits = int((inside[choosing:] > threshold).sum())
    alarms = int((outside[choosing:] > threshold).sum())
    tpr_low = float(rate_at_least(hits, counted, alpha))
    fpr_high = float(rate_at_most(alarms, counted, alpha))
    ratio, family = _within_family(claim.phases, fpr_high, tpr_low, claim.delta)
    lower = _lower_bound(tpr_low, fpr_high, claim.delta)
    return Audit(
        consistent=bool(allowed.power(fpr_high) >= tpr_low),
        lower_bound=lower,
        family_lower_bound=family,
        noise_ratio=ratio,
        claimed=claim.epsilon,
        delta=claim.delta,
        confidence=confidence,
        runs=runs,
        counted=counted,
        tpr=hits / counted,
        fpr=alarms / counted,
        tpr_low=tpr_low,
        fpr_high=fpr_high,
        threshold=threshold,
    )


def check_runs(runs: int, confidence: float) -> None:
    """Raise ArgumentError unless runs is even and large enough, and confidence in (0, 1)."""
    check_integer("runs", runs, LEAST_RUNS)
    if runs % 2:
        raise ArgumentError(f"runs must be even, as half of them have the canary; got {runs}")
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence must be between 0 and 1, got {confidence}")


def rate_at_least(hits: float | np.ndarray, trials: int, alpha: float) -> np.ndarray:
    """Clopper-Pearson lower bound on a binomial's rate: wrong with probability alpha at most."""
    hits = np.asarray(hits, dtype=float)
    return np.where(hits > 0, beta.ppf(alpha, np.maximum(hits, 1e-9), trials - hits + 1), 0.0)


def rate_at_most(hits: float | np.ndarray, trials: int, alpha: float) -> np.ndarray:
    """Clopper-Pearson upper bound on a binomial's rate: wrong with probability alpha at most."""
    return 1 - rate_at_least(trials - np.asarray(hits, dtype=float), trials, alpha)


def _threshold(
    inside: np.ndarray, outside: np.ndarray, counted: int, alpha: float, allowed: TradeOff
) -> float:
    """Choose the threshold whose bounds are expected to exceed the allowed ones most."""
    values = np.unique(np.concatenate([inside, outside]))
    middles = values[:-1] / 2 + values[1:] / 2
    if len(middles) == 0:
        return float(values[0])
    # Half a run is added on either side, so that no rate is exactly 0 or 1.
    hits, alarms = (
        (len(scores) - np.searchsorted(np.sort(scores), middles, "right") + 0.5)
        * (counted / (len(scores) + 1))
        for scores in (inside, outside)
    )
    tpr_low = rate_at_least(hits, counted, alpha)
    limit = allowed.power(rate_at_most(alarms, counted, alpha))
    return float(middles[np.argmax(ndtri(tpr_low) - ndtri(limit))])


def _within_family(
    phases: tuple[Phase, ...], fpr: float, tpr: float, delta: float
) -> tuple[float | None, float]:
    ratio = largest_noise(phases, fpr, tpr)
    return ratio, 0.0 if ratio is None else TradeOff(scaled(phases, ratio)).epsilon(delta)


def _lower_bound(tpr: float, fpr: float, delta: float) -> float:
    """ε of an attack with these rates (Kairouz, Oh, Viswanath, ICML 2015, theorem 2.1)."""
    ratios = ((tpr - delta) / fpr, (1 - fpr - delta) / (1 - tpr))
    return math.log(max(1.0, *ratios))


def _score(value: float | Tensor, run: int) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"train must return one number, got {value!r} in run {run}") from error
    if not math.isfinite(score):
        raise ArgumentError(
            f"train returned {score} in run {run}: scores must be finite. Did the training diverge?"
        )
    return score


def _check(train: object, claim: object) -> None:
    if not callable(train):
        raise ArgumentError(f"train must be a function (with_canary, run) -> score, got {train!r}")
    if not isinstance(claim, PrivacyStatement):
        raise ArgumentError(
            f"claim must be a PrivacyStatement, got a {type(claim).__name__}: use the statement of "
            "a fit_private, or one from make_statement"
        )
    if claim.adjacency != ADD_OR_REMOVE:
        raise UnsupportedError(
            f"claim is for another adjacency: {claim.adjacency!r}. An audit needs "
            f"{ADD_OR_REMOVE!r}, as it adds or removes a canary"
        )
    if not math.isfinite(claim.epsilon):
        raise ArgumentError(
            f"claim promises nothing: its epsilon is {claim.epsilon} at delta {claim.delta:g}. "
            "Audit a training with more noise"
        )
    claim.verify()
