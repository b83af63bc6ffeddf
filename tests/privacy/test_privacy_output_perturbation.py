"""Noise on the optimum: how far neighbours' optima are apart, and what is added."""

import math
from functools import partial
from statistics import NormalDist

import pytest
import torch
from bounded_problem import (
    BOUNDS,
    INPUTS,
    L2,
    QUIET,
    B,
    N,
    R,
    Silent,
    Written,
    flat,
    joined,
    outliers,
    private,
    samples,
    tangent,
)
from small_models import images, vit
from torch.utils.data import TensorDataset

from tangent_ops import last_blocks, linearize, load_delta, save_delta
from tangent_ops.errors import ArgumentError, ConvergenceError, UnsupportedError
from tangent_ops.privacy.convex.last_iterate import fit_last_iterate
from tangent_ops.privacy.convex.output_perturbation import perturb_output
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.statement import statement_of

OPTIONS = {**BOUNDS, **QUIET, "delta": 1e-3}
PHI = NormalDist().cdf
fit = partial(private, perturb_output, **OPTIONS)


def without(data, index):
    keep = [i for i in range(len(data)) if i != index]
    return TensorDataset(*(column[keep] for column in data.tensors))


@pytest.mark.parametrize("data", [samples(), outliers()], ids=["samples", "outliers"])
@pytest.mark.parametrize("l2", [L2, 0.02])
def test_neighbours_optima_are_within_the_sensitivity(data, l2):
    """Without each sample, and with one more of two sizes, at a fixed normalizer."""
    size = len(data)
    optimum = Written(data, size, l2).minimum()
    others = [without(data, index) for index in range(size)]
    for scale in (1.0, 1e3):
        extra = samples(1, scale, seed=5)
        others.append(joined(data, extra))
    moved = [float((Written(o, size, l2).minimum() - optimum).norm()) for o in others]
    bound = R * B / (size * l2)
    assert max(moved) <= bound
    assert max(moved) >= 0.05 * bound  # the bound is of this size, not of another


def misleading():
    """The first batch has residuals scaled far below B, where the loss is quadratic."""
    inputs, targets = outliers().tensors
    order = [10, 10, 10, 10, *range(8)]
    # A sample may be there once: these four are almost the same.
    apart = 1 + 1e-9 * torch.arange(len(order), dtype=inputs.dtype)[:, None]
    return TensorDataset(inputs[order] * apart, targets[order])


@pytest.mark.parametrize("data", [samples(), outliers(), misleading()], ids=["s", "o", "m"])
@pytest.mark.parametrize("normalizer", [None, 25.0])
def test_without_noise_it_is_the_optimum(data, normalizer):
    """Up to the allowance τ, which is small here, and from any start."""
    model = tangent()
    with torch.no_grad():
        for value in model.deltas().values():
            value.add_(0.3)
    noise = {"noise_multiplier": 3.0, "source": Silent()}
    found = fit(model, data, **noise, inexactness=1e-5, normalizer=normalizer)
    size = normalizer or len(data)
    exact = Written(data, size).minimum()
    bound = R * B / (size * L2)
    assert float((flat(model.deltas()) - exact).norm()) <= 1.1e-5 * bound
    assert found.sensitivity == pytest.approx(bound * (1 + 2e-5), rel=1e-12)
    assert found.sigma == pytest.approx(3.0 * found.sensitivity, rel=1e-12)


def test_noise_has_the_standard_deviation_stated():
    exact = Written(samples(), N).minimum()
    drawn = []
    for seed in range(4):
        model = tangent()
        found = fit(model, noise_multiplier=3.0, source=NoiseSource(seed))
        drawn.append(flat(model.deltas()) - exact)
        assert torch.equal(flat(found.delta), flat(model.deltas()))
    entries = torch.cat(drawn)
    expected = 3.0 * 1.02 * R * B / (N * L2)
    assert found.sigma == pytest.approx(expected, rel=1e-12)
    # A chi-square of so many entries, 5 standard deviations either way.
    assert abs(float(entries.std()) / expected - 1) < 5 / math.sqrt(2 * len(entries)) + 0.01
    assert abs(float(entries.mean())) < 5 * expected / math.sqrt(len(entries))


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 5.0])
def test_the_noise_for_a_target_is_that_of_the_analytic_gaussian_mechanism(epsilon):
    """Balle, Wang 2018, theorem 8: δ(ε) = Φ(Δ/2σ - εσ/Δ) - e^ε Φ(-Δ/2σ - εσ/Δ)."""
    found = fit(target_epsilon=epsilon)
    ratio = found.sigma / found.sensitivity

    def failure(s):
        return PHI(0.5 / s - epsilon * s) - math.exp(epsilon) * PHI(-0.5 / s - epsilon * s)

    assert failure(ratio) <= 1e-3 < failure(ratio / 1.003)
    assert found.statement.epsilon <= epsilon
    assert found.statement.epsilon == pytest.approx(epsilon, rel=5e-3)
    assert found.statement.clip == R * B
    found.statement.verify()


def test_the_statement_travels_with_the_delta(tmp_path):
    model = tangent()
    found = fit(model, target_epsilon=1.0)
    save_delta(found.delta, tmp_path / "delta.safetensors")
    loaded = load_delta(tmp_path / "delta.safetensors", anchor=model.fingerprint)
    assert statement_of(loaded) == found.statement
    text = " ".join(found.statement.assumes)
    assert f"the number of samples, {N}, and the normalizer, {N}, are public" in text


def test_default_noise_is_the_systems():
    found = [fit(target_epsilon=1.0) for _ in "ab"]
    assert not torch.equal(flat(found[0].delta), flat(found[1].delta))
    assert "operating system" in found[0].statement.noise


def test_a_solver_that_did_not_arrive_releases_nothing():
    model = tangent()
    with pytest.raises(ConvergenceError, match=r"within .* was allowed"):
        fit(model, l2=1e-4, target_epsilon=1.0, max_iterations=1, inexactness=1e-9)
    assert not flat(model.deltas()).any()


def test_refuses():
    for options, match in (
        ({"delta": 1 / N}, "not below 1/N = 0.111"),
        ({"delta": 0.0}, "delta must be between 0 and 1"),
        ({"noise_multiplier": 1.0}, "one of target_epsilon and noise_multiplier"),
        ({"target_epsilon": None}, "one of target_epsilon and noise_multiplier"),
        ({"target_epsilon": -1.0}, "target_epsilon must be positive"),
        ({"target_epsilon": None, "noise_multiplier": 0.0}, "noise_multiplier must be positive"),
        ({"inexactness": 0.0}, "inexactness must be above 0"),
        ({"inexactness": 2.0}, "inexactness must be above 0"),
        ({"max_iterations": 0}, "max_iterations must be an integer"),
        ({"l2": 0.0}, "l2 must be positive"),
        ({"jacobian": -1.0}, "jacobian must be positive"),
    ):
        with pytest.raises(ArgumentError, match=match):
            fit(**{"target_epsilon": 1.0} | options)
    with pytest.raises(ArgumentError, match="LinearizedModel"):
        fit(torch.nn.Linear(INPUTS, 2), target_epsilon=1.0)
    with pytest.raises(UnsupportedError, match="blocks"):
        fit(target_epsilon=1.0, cache=True)


@pytest.mark.parametrize("mechanism", [perturb_output, fit_last_iterate])
def test_a_vision_transformer_in_single_precision_with_cached_features(mechanism):
    """Agrees with float64 without a cache to single precision."""
    deltas = []
    for dtype, cache in ((torch.float64, False), (torch.float32, True)):
        model = vit(depth=2, embed_dim=12, num_heads=2).to(dtype)
        model = linearize(model, last_blocks(model, 1))
        data = TensorDataset(images(8).to(dtype), torch.arange(8) % 5)
        median = 4.64  # of the Jacobian norms, some below and some above
        options = {"steps": 20} if mechanism is fit_last_iterate else {}
        found = private(
            mechanism,
            model,
            data,
            median**2 / 20,
            jacobian=median,
            residual=5.0,
            delta=1e-3,
            noise_multiplier=1.0,
            source=Silent(),
            cache=cache,
            **QUIET,
            **options,
        )
        deltas.append(flat(found.delta).double())
    allowed = 5.0 / (8 * median / 20) * 0.01 if mechanism is perturb_output else 0.0
    apart = float((deltas[0] - deltas[1]).norm())
    # Twice the solver's allowance; the weights' slack of 1e-4 and rounding besides.
    assert apart <= 2 * allowed + 5e-4 * float(deltas[0].norm())
    assert float(deltas[0].norm()) > 20 * allowed
