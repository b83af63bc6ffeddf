"""`fit_last_iterate`: private noisy gradient descent that releases only its last iterate.

By composition, T steps cost sqrt(T) times as much as one. On a strongly convex objective, every
step shrinks the influence of the steps before it, so the cost stays bounded for any T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from tangent_ops.data import Data, in_order
from tangent_ops.delta import Delta
from tangent_ops.errors import ArgumentError
from tangent_ops.exact.problem import Cache, check_l2
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.accounting import Phase
from tangent_ops.privacy.checks import check_contents, check_dataset, check_model
from tangent_ops.privacy.convex.bounded import Bounds, Objective
from tangent_ops.privacy.options import Privacy
from tangent_ops.privacy.statement import PrivacyStatement, attach, make_statement


@dataclass(frozen=True)
class LastIterate:
    """The result of `fit_last_iterate`. All of it may be published.

    Attributes:
        delta: the last iterate, with the statement attached.
        statement: what it promises.
        noise: ν, standard deviation of the noise on each entry of every step's gradient.
        lr: η.
        contraction: c; a step multiplies the distance of two iterates by c at most.
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
    privacy: Privacy,
    bounds: Bounds,
    *,
    lr: float | None = None,
    batch_size: int = 64,
    cache: Cache = False,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> LastIterate:
    """Fit a tangent model privately: Δ <- Δ - η(∇F(Δ) + ν Z), T times from Δ = 0, over all samples.

    F(Δ) = (1/E) Σ_i ℓ_i(Δ) + l2/2 ‖Δ‖² with the bounded losses of `bounded`:
    residuals of norm above B are clipped, and Jacobians of norm above R scaled down. With m = l2
    and M = l2 + (N + 1) R²/E the steps φ, φ' of two neighbours are c-contractive,
    c = max(|1 - η m|, |1 - η M|), and never further apart than s = η R B / E. The last iterate is
    then μ-Gaussian-private with

        μ = (R B / (E ν)) sqrt( (1 - c^T)/(1 + c^T) (1 + c)/(1 - c) )

    (Bok, Su, Altschuler, "Shifted interpolation for differential privacy", ICML 2024, for strongly
    convex losses). Proof: in step t, shift a copy of the iterate by a_t towards the neighbour's
    iterate; the step's noise hides the shift with (a_t / (η ν))-GDP, and the steps compose. The
    remaining distance contracts; it is zero after step T if Σ c^{T-t} a_t = s (1 - c^T)/(1 - c),
    and the least Σ a_t² of such shifts (Cauchy, Schwarz) is (μ η ν)². μ is exact for one parameter
    and a quadratic F, where the iterates' means differ by s (1 - c^T)/(1 - c), and their variance
    is (η ν)² (1 - c^{2T})/(1 - c²). μ never exceeds what composition gives, sqrt(T) R B / (E ν).

    Args:
        tangent: its deltas must be zero, and are set to the last iterate.
        data: a Dataset of (input, class), or a DataLoader; all samples are read, in order. Without
            random augmentation.
        l2: m, positive.
        privacy: the guarantee and the noise; steps is T, noise_multiplier 1/μ. max_grad_norm,
            expected_batch_size and start are not used.
        bounds: R, B, the target and E; `jacobian_norms` of public data helps to choose R.
        lr: η, below 2/M; None for 1/M.
        batch_size: of a Dataset; a DataLoader has its own. The mechanism does not depend on it.
        cache: as in `fit`: keep what enters the first trained block.
        device: moves the model there first.
        progress: show bars; they show no loss.

    Returns:
        The delta and its statement.

    Raises:
        ArgumentError: an invalid argument; deltas that are not zero; a step size without
            contraction; a sample that is in the data twice, by index or by content.
        UnsupportedError: a model in 16 bits; preprocessing fitted to data; a batch norm that uses
            its batch; cache, for a model that cannot be split.
        NonFiniteLossError: a gradient is NaN or infinite; the deltas are zero as before.
    """
    check_model(tangent)
    privacy.check_unused("fit_last_iterate", "max_grad_norm", "expected_batch_size", "start")
    check_l2(l2)
    steps = privacy.steps
    loader = in_order(data, batch_size)
    samples = check_dataset(loader.dataset, privacy.public_preprocessing)
    privacy.check_failure(samples)
    multiplier = privacy.multiplier(1.0, 1)
    smoothness = bounds.smoothness(l2, samples)
    lr = 1 / smoothness if lr is None else lr
    gap = contraction_gap(lr, l2, smoothness)
    if any(value.any() for value in tangent.deltas().values()):
        raise ArgumentError(
            "the deltas are not zero: they may come from private data, which this statement would "
            "not count. Call tangent.zero_()"
        )
    check_contents(loader)
    objective = Objective(
        tangent, loader, l2, bounds, cache=cache, device=device, progress=progress
    )
    noise = objective.sensitivity * multiplier * last_iterate_growth(gap, steps)
    source = privacy.noise_source()
    layout = objective.passes.layout
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
        delta=privacy.delta,
        sampling="none: every sample in every step",
        noise=source.words,
        assumes=(*objective.assumes, "no iterate but the last is published"),
    )
    tangent.load_delta_dict(layout.named(iterate))
    return LastIterate(
        attach(tangent.delta_dict(), statement), statement, noise, lr, 1 - gap, steps
    )


def contraction_gap(lr: float, strong: float, smooth: float) -> float:
    """1 - c of a gradient step: min(η m, 2 - η M), for η < 2/M.

    Args:
        lr: η.
        strong: m, the constant of strong convexity.
        smooth: M, the gradient's Lipschitz constant.

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
    """sqrt( (1 - c^T)/(1 + c^T) (1 + c)/(1 - c) ): μ of T steps over μ of one step.

    Args:
        gap: 1 - c, in (0, 1].
        steps: T.
    """
    if gap == 1:
        return 1.0
    power = steps * math.log1p(-gap)
    return math.sqrt(-math.expm1(power) / (1 + math.exp(power)) * (2 - gap) / gap)
