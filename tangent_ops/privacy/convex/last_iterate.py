"""Private fitting by noisy gradient descent of which the last iterate alone is released.

Convexity pays: composition charges every step, sqrt(T) in all. Of a strongly convex objective the
early steps are forgotten, and the price stays finite however long the descent goes on.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from tqdm import tqdm

from tangent_ops.data import Data, check_integer
from tangent_ops.delta import Delta
from tangent_ops.errors import ArgumentError
from tangent_ops.exact.problem import check_l2, in_order
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.accounting import Phase
from tangent_ops.privacy.checks import check_contents, check_dataset, check_model
from tangent_ops.privacy.convex.bounded import Bounds, Objective
from tangent_ops.privacy.convex.budget import release_noise
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.statement import PrivacyStatement, attach, make_statement


@dataclass(frozen=True)
class LastIterate:
    """What noisy gradient descent released. All of it may be published.

    Attributes:
        delta: the last iterate, with the statement attached.
        statement: what it promises.
        noise: ν, standard deviation of the noise on each entry of every step's gradient.
        lr: η.
        contraction: c, by which a step brings two iterates nearer at least.
        steps: T.
    """

    delta: Delta
    statement: PrivacyStatement
    noise: float
    lr: float
    contraction: float
    steps: int


def fit_last_iterate(
    tangent: LinearizedModel,
    data: Data,
    l2: float,
    *,
    jacobian_bound: float,
    residual_bound: float,
    steps: int,
    delta: float,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    lr: float | None = None,
    target: float = 15.0,
    normalizer: float | None = None,
    batch_size: int = 64,
    cache: bool | str | os.PathLike[str] = False,
    device: str | torch.device | None = None,
    source: NoiseSource | None = None,
    public_preprocessing: bool = False,
    progress: bool = True,
) -> LastIterate:
    """Fit a tangent model privately: Δ <- Δ - η(∇F(Δ) + ν Z), T times from Δ = 0, over all samples.

    F(Δ) = (1/E) Σ_i ℓ_i(Δ) + l2/2 ‖Δ‖² with the bounded losses of `tangent_ops.privacy.convex.bounded`:
    residuals of norm above B are clipped, and Jacobians of norm above R scaled down. With m = l2
    and M = l2 + (N + 1) R²/E the steps φ, φ' of two neighbours are c-contractive,
    c = max(|1 - η m|, |1 - η M|), and never further apart than s = η R B / E. The last iterate is
    then μ-Gaussian-private with

        μ = (R B / (E ν)) sqrt( (1 - c^T)/(1 + c^T) (1 + c)/(1 - c) )

    (Bok, Su, Altschuler, "Shifted interpolation for differential privacy", ICML 2024, for strongly
    convex losses). Proof: let a copy of ours move a_t towards the neighbour's iterate in step t,
    which its noise hides at a price of a_t / (η ν), composed. Contraction takes of the rest; they
    meet in step T if Σ c^{T-t} a_t = s (1 - c^T)/(1 - c), and the least Σ a_t² of such (Cauchy,
    Schwarz) is (μ η ν)². It is exact for one parameter and a quadratic F, where the iterates' means
    differ by s (1 - c^T)/(1 - c), and their variance is (η ν)² (1 - c^{2T})/(1 - c²). It is never
    above what composition gives, sqrt(T) R B / (E ν).

    Args:
        tangent: its deltas have to be zero, and are set to the last iterate.
        data: a Dataset of (input, class), or a DataLoader, which is read in order, whole; without
            random augmentation.
        l2: m, positive.
        jacobian_bound: R, in logits per unit of Δ; `jacobian_norms` of public data shows the size.
        residual_bound: B, in logits.
        steps: T.
        delta: δ of the statement, below 1/N.
        target_epsilon: gives the noise that keeps ε at that δ, by PLD. This, or
        noise_multiplier: 1/μ.
        lr: η, below 2/M; None for 1/M.
        target: value the target class's logit is drawn to.
        normalizer: E, public; None for N, which is then public.
        batch_size: of a Dataset; a DataLoader has its own. No part of the mechanism.
        cache: as in `fit`: keep what enters the first trained block.
        device: moves the model there first.
        source: of the noise; None for `NoiseSource()`.
        public_preprocessing: as in `fit_private`.
        progress: show bars; they show no loss.

    Returns:
        The delta and its statement.

    Raises:
        ArgumentError: an argument other than these; a step size without contraction; a sample that
            is in the data twice, by index or by content.
        UnsupportedError: a model in 16 bits; preprocessing fitted to data; a batch norm that uses
            its batch; cache, for a model that cannot be split.
        NonFiniteLossError: a gradient is NaN or infinite; the deltas are zero as before.
    """
    check_model(tangent)
    check_l2(l2)
    check_integer("steps", steps, 1)
    bounds = Bounds(jacobian_bound, residual_bound, target, normalizer)
    loader = in_order(data, batch_size)
    samples = check_dataset(loader.dataset, public_preprocessing)
    multiplier = release_noise(samples, delta, target_epsilon, noise_multiplier)
    smoothness = bounds.smoothness(l2, samples)
    lr = 1 / smoothness if lr is None else lr
    gap = contraction_gap(lr, l2, smoothness)
    if any(value.any() for value in tangent.deltas().values()):
        raise ArgumentError(
            "the deltas are not zero: what they hold may come from private data, which this "
            "statement would not count. Linearize the anchor anew, or set them to zero"
        )
    check_contents(loader)
    objective = Objective(
        tangent, loader, l2, bounds, cache=cache, device=device, progress=progress
    )
    noise = objective.sensitivity * multiplier * last_iterate_growth(gap, steps)
    source = NoiseSource() if source is None else source
    layout = objective.problem.layout
    iterate = layout.zeros()
    for _ in tqdm(range(steps), "private fit", unit="step", disable=not progress):
        iterate.sub_(objective.gradient(iterate), alpha=lr)
        iterate.add_(source.normal(iterate.shape, lr * noise, layout.dtype, layout.device))
    statement = make_statement(
        mechanism=(
            f"noisy gradient descent over all samples, {steps} steps of {lr:.6g} with noise of "
            f"{noise:.6g} on each entry of the gradient, from 0; the last iterate alone is "
            f"released: {1 / multiplier:.6g}-GDP (Bok, Su, Altschuler 2024)"
        ),
        phases=(Phase(multiplier, 1.0, 1),),
        clip=bounds.gradient,
        delta=delta,
        sampling="none: every sample in every step",
        noise=source.words,
        assumes=(*objective.assumes, "no iterate but the last gets out"),
    )
    tangent.load_delta_dict(layout.named(iterate))
    return LastIterate(
        attach(tangent.delta_dict(), statement), statement, noise, lr, 1 - gap, steps
    )


def contraction_gap(lr: float, strong: float, smooth: float) -> float:
    """1 - c of a gradient step: min(η m, 2 - η M), for η < 2/M.

    Args:
        lr: η.
        strong: m, of strong convexity.
        smooth: M, of the gradient's Lipschitz constant.

    Raises:
        ArgumentError: there is no contraction.
    """
    gap = min(lr * strong, 2 - lr * smooth)
    if not gap > 0:
        raise ArgumentError(
            f"lr must be positive and below 2/M = {2 / smooth:.6g}, where M = l2 + (N + 1) R²/E, "
            f"got {lr:g}: larger steps do not contract"
        )
    return gap


def last_iterate_growth(gap: float, steps: int) -> float:
    """sqrt( (1 - c^T)/(1 + c^T) (1 + c)/(1 - c) ): what T steps cost, in units of one.

    Args:
        gap: 1 - c, in (0, 1].
        steps: T.
    """
    if gap == 1:
        return 1.0
    power = steps * math.log1p(-gap)
    return math.sqrt(-math.expm1(power) / (1 + math.exp(power)) * (2 - gap) / gap)
