"""Noisy gradient descent: the formula, the contraction, and the last iterate's distribution."""

import math
from functools import partial
from statistics import NormalDist

import pytest
import torch
from bounded_problem import (
    BOUNDS,
    L2,
    QUIET,
    B,
    N,
    R,
    Silent,
    Written,
    flat,
    joined,
    objective,
    outliers,
    private,
    samples,
    tangent,
)

from tangent_ops.errors import ArgumentError, NonFiniteLossError
from tangent_ops.privacy.convex.bounded import Bounds
from tangent_ops.privacy.convex.last_iterate import (
    contraction_gap,
    fit_last_iterate,
    last_iterate_growth,
)
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.statement import statement_of

OPTIONS = {**BOUNDS, **QUIET, "delta": 1e-3, "steps": 30}
SMOOTH = L2 + (N + 1) * R**2 / N
PHI = NormalDist().cdf
fit = partial(private, fit_last_iterate, **OPTIONS)


def mu(found, normalizer=N):
    """The theorem, written out, from what was run."""
    c, steps = found.contraction, found.steps
    factor = (1 - c**steps) / (1 + c**steps) * (1 + c) / (1 - c)
    return R * B / (normalizer * found.noise) * math.sqrt(factor)


@pytest.mark.parametrize("steps", [1, 2, 7, 300])
@pytest.mark.parametrize("c", [0.0, 0.3, 0.99, 1 - 1e-7])
def test_growth_is_that_of_one_dimension(c, steps):
    """x <- c x + s + Z against x <- c x + Z: means and variances step by step."""
    mean = variance = 0.0
    for _ in range(steps):
        mean, variance = c * mean + 1.0, c**2 * variance + 1.0
    found = last_iterate_growth(1 - c, steps)
    assert found == pytest.approx(mean / math.sqrt(variance), rel=1e-9)
    assert found <= math.sqrt(steps) * (1 + 1e-12)  # composition's


def test_growth_stays_finite():
    assert last_iterate_growth(0.01, 10**9) == pytest.approx(math.sqrt(1.99 / 0.01), rel=1e-12)
    assert last_iterate_growth(1e-9, 100) == pytest.approx(10.0, rel=1e-6)


@pytest.mark.parametrize("data", [samples(), outliers()], ids=["samples", "outliers"])
@pytest.mark.parametrize("share", [0.5, 1.0, 1.6, 1.95])
def test_steps_contract_and_neighbours_steps_are_near(data, share):
    """On random pairs of points, for two data sets that differ by one sample."""
    size = len(data)
    more = joined(data, samples(1, 5.0, 9))
    bounds = Bounds(R, B, BOUNDS["target"], float(size))
    mine, others = (objective(d, normalizer=float(size)) for d in (data, more))
    smooth = bounds.smoothness(L2, size)
    assert smooth == pytest.approx(L2 + (size + 1) * R**2 / size)
    lr = share / smooth
    c = 1 - contraction_gap(lr, L2, smooth)
    assert c == pytest.approx(max(abs(1 - lr * L2), abs(1 - lr * smooth)), rel=1e-12)
    noise = torch.Generator().manual_seed(4)
    points = torch.randn(4, flat(tangent().deltas()).numel(), dtype=torch.float64, generator=noise)
    steps = [[x - lr * problem.gradient(x) for x in points] for problem in (mine, others)]
    for images in steps:
        for i in range(4):
            for j in range(i):
                moved = float((images[i] - images[j]).norm())
                assert moved <= c * float((points[i] - points[j]).norm()) * (1 + 1e-12)
    for image, other in zip(*steps, strict=True):
        apart = float((image - other).norm())
        assert 0.1 * lr * R * B / size < apart <= lr * R * B / size


@pytest.mark.parametrize("share", [1.0, 1.7])
@pytest.mark.parametrize("normalizer", [None, 12.0])
def test_noise_fits_the_theorem(share, normalizer):
    size = normalizer or N
    smooth = L2 + (N + 1) * R**2 / size
    found = fit(target_epsilon=1.0, lr=share / smooth, normalizer=normalizer)
    mine = mu(found, size)
    # δ(ε) of μ-Gaussian privacy: Dong, Roth, Su 2022, corollary 2.13.
    failure = [PHI(-1 / m + m / 2) - math.e * PHI(-1 / m - m / 2) for m in (mine, 1.003 * mine)]
    assert failure[0] <= 1e-3 < failure[1]
    assert found.statement.epsilon <= 1.0
    assert found.statement.epsilon == pytest.approx(1.0, rel=5e-3)
    (phase,) = found.statement.phases
    assert (phase.sample_rate, phase.steps) == (1.0, 1)
    assert phase.noise_multiplier == pytest.approx(1 / mine, rel=1e-9)
    assert found.contraction == pytest.approx(max(1 - share / smooth * L2, share - 1), rel=1e-12)
    found.statement.verify()


def test_it_is_noisy_gradient_descent():
    """The same noise on the gradients written out gives the same iterate."""
    model, data = tangent(), outliers()
    found = fit(model, data, noise_multiplier=2.0, source=NoiseSource(3))
    written, noise = Written(data, len(data)), NoiseSource(3)
    assert mu(found, len(data)) == pytest.approx(1 / 2.0, rel=1e-9)
    delta = torch.zeros(flat(model.deltas()).numel(), dtype=torch.float64)
    for _ in range(30):
        drawn = noise.normal(delta.shape, 1.0, torch.float64, "cpu")
        delta = delta - found.lr * written.gradient(delta) + found.lr * found.noise * drawn
    assert float((flat(model.deltas()) - delta).norm()) <= 1e-9 * float(delta.norm())
    assert torch.equal(flat(found.delta), flat(model.deltas()))
    assert statement_of(found.delta) == found.statement


def test_without_noise_it_arrives_at_the_optimum():
    model, data = tangent(), samples()
    fit(model, data, noise_multiplier=1.0, source=Silent(), steps=200)
    exact = Written(data, N).minimum()
    assert float((flat(model.deltas()) - exact).norm()) <= 1e-6 * float(exact.norm())


def test_simulated_neighbours_are_no_further_apart_than_stated():
    """The best threshold's advantage over many runs of a one-parameter problem is below μ's."""
    runs, steps, m, smooth, shift, nu = 200_000, 12, 0.2, 1.0, 0.3, 0.5
    lr = 1.3 / smooth
    gap = contraction_gap(lr, m, smooth)
    noise = torch.Generator().manual_seed(0)
    ends = []
    for sign in (0.0, 1.0):
        x = torch.zeros(runs, dtype=torch.float64)
        for _ in range(steps):
            z = torch.randn(runs, dtype=torch.float64, generator=noise)
            # Smooth and m-convex, not quadratic; the neighbour's gradient is `shift` away at most.
            gradient = m * x + (smooth - m) * x.clamp(-0.5, 0.5) + sign * shift
            x = x - lr * (gradient + nu * z)
        ends.append(x)
    bound = shift / nu * last_iterate_growth(gap, steps)
    thresholds = torch.linspace(-3, 3, 61)
    advantage = max(
        float((ends[1] < t).double().mean() - (ends[0] < t).double().mean()) for t in thresholds
    )
    allowed = 2 * PHI(bound / 2) - 1
    assert 0.3 * allowed < advantage <= allowed + 5 / math.sqrt(runs)


def test_refuses_steps_that_do_not_contract():
    model = tangent()
    with pytest.raises(ArgumentError, match=f"below 2/M = {2 / SMOOTH:.6g}"):
        fit(model, target_epsilon=1.0, lr=2 / SMOOTH)
    # 2/M for N samples is too large for a neighbour with N + 1.
    alone = L2 + R**2
    with pytest.raises(ArgumentError, match="do not contract"):
        fit(model, target_epsilon=1.0, lr=1.99 / alone)
    assert not flat(model.deltas()).any()


def test_refuses_deltas_that_are_not_zero():
    model = tangent()
    with torch.no_grad():
        next(iter(model.deltas().values()))[0, 0] = 1e-30
    with pytest.raises(ArgumentError, match="not zero"):
        fit(model, target_epsilon=1.0)


def test_refuses():
    for options, match in (
        ({"delta": 1 / N}, "below 1/N"),
        ({"steps": 0}, "steps must be an integer"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"lr": math.inf}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"l2": 0.0}, "l2 must be positive"),
        ({"noise_multiplier": 1.0}, "one of target_epsilon"),
        ({"residual": 0.0}, "residual must be positive"),
    ):
        with pytest.raises(ArgumentError, match=match):
            fit(**{"target_epsilon": 1.0} | options)


def test_a_failure_on_the_way_releases_nothing():
    class Broken(NoiseSource):
        def normal(self, shape, std, dtype, device):
            return torch.full(shape, math.inf, dtype=dtype, device=device)

    model = tangent()
    with pytest.raises(NonFiniteLossError):
        fit(model, noise_multiplier=1.0, source=Broken())
    assert not flat(model.deltas()).any()


def test_nothing_of_the_way_is_shown(capsys):
    fit(target_epsilon=1.0, progress=True, steps=3)
    shown = capsys.readouterr().err
    assert "private fit" in shown
    assert "loss" not in shown and "bound" not in shown
