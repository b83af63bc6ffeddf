"""``tangent-ops audit``."""

from __future__ import annotations

import math
import secrets
from typing import Annotated

import typer

from tangent_ops.cli.messages import errors, need_privacy, say

_FEATURES, _WIDTH, _OUTPUTS = 8, 16, 4
_LEAST_SAMPLES = 8  # beside the canary
_MOST_SAMPLES = 1000
_LR = 0.1


def audit(
    noise_multiplier: Annotated[
        float, typer.Option(help="Standard deviation of the noise / clipping norm.")
    ] = 1.0,
    sample_rate: Annotated[
        float, typer.Option(help="Probability of a sample to be in a step, 0.001 to 1.")
    ] = 0.5,
    steps: Annotated[int, typer.Option(help="Steps per training.")] = 5,
    max_grad_norm: Annotated[float, typer.Option(help="The clipping norm.")] = 1.0,
    delta: Annotated[float, typer.Option(help="State epsilon at this delta.")] = 1e-5,
    runs: Annotated[int, typer.Option(help="Trainings, half of them with the canary.")] = 400,
    confidence: Annotated[float, typer.Option(help="Confidence level of the result.")] = 0.95,
    mode: Annotated[
        str, typer.Option(help="How gradients are clipped: bookkeeping, ghost or per-sample.")
    ] = "bookkeeping",
    seed: Annotated[
        int | None, typer.Option(help="To repeat a run. Default: a new one each time.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Test on this machine whether private training is as private as it claims.

    Trains a small model by fit_private many times, with and without a canary: a sample that is as
    easy to detect as possible. An attacker's success bounds epsilon from below. Exits with 1 if
    this refutes the claim. For your own model use tangent_ops.privacy.audit.
    """
    need_privacy()

    from tangent_ops.privacy import Privacy
    from tangent_ops.privacy.auditing.audit_fit import audit_fit

    with errors():
        samples = _check(
            noise_multiplier, sample_rate, steps, max_grad_norm, delta, runs, confidence, mode, seed
        )
        seed = secrets.randbits(32) if seed is None else seed
        tangent, dataset, canary = _problem(samples, seed)
        found = audit_fit(
            tangent,
            dataset,
            canary,
            Privacy(
                delta=delta,
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_grad_norm,
                steps=steps,
                seed=seed,
            ),
            sample_rate=sample_rate,
            lr=_LR,
            runs=runs,
            confidence=confidence,
            mode=mode,
        )
    if as_json:
        typer.echo(found.to_json())
    else:
        say(f"audited:        fit_private, {samples} samples and a canary, seed {seed}\n{found}")
    if not found.consistent:
        raise typer.Exit(1)


def _problem(samples: int, seed: int):
    """A small model, data for it, and an input for a canary."""
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    from tangent_ops.model.linearize import linearize

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = nn.Sequential(nn.Linear(_FEATURES, _WIDTH), nn.GELU(), nn.Linear(_WIDTH, _OUTPUTS))
        inputs = torch.randn(samples, _FEATURES)
        residuals = torch.randn(samples, _OUTPUTS)
        # The canary's residual is in output 0 only. Without one there, the others' gradients hardly
        # overlap with the canary's and cannot hide it.
        residuals[:, 0] = 0
        with torch.no_grad():
            dataset = TensorDataset(inputs, model(inputs) + residuals)
        return linearize(model), dataset, torch.randn(1, _FEATURES)


def _check(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    max_grad_norm: float,
    delta: float,
    runs: int,
    confidence: float,
    mode: str,
    seed: int | None,
) -> int:
    """The number of samples beside the canary.

    Raises:
        ArgumentError: naming the option, its value, and what is supported.
    """
    from tangent_ops.privacy.accounting import SMALLEST_DELTA
    from tangent_ops.privacy.auditing.audit import LEAST_RUNS
    from tangent_ops.privacy.per_sample.gradients import MODES

    _must(0 < noise_multiplier < math.inf, "--noise-multiplier", noise_multiplier, "above 0")
    _must(
        1 / _MOST_SAMPLES <= sample_rate <= 1,
        "--sample-rate",
        sample_rate,
        f"{1 / _MOST_SAMPLES:g} to 1",
    )
    _must(steps >= 1, "--steps", steps, "1 or more")
    _must(0 < max_grad_norm < math.inf, "--max-grad-norm", max_grad_norm, "above 0")
    _must(runs >= LEAST_RUNS, "--runs", runs, f"{LEAST_RUNS} or more: fewer show nothing")
    _must(runs % 2 == 0, "--runs", runs, "an even number, as half of them have the canary")
    _must(0 < confidence < 1, "--confidence", confidence, "between 0 and 1, say 0.95")
    _must(mode in MODES, "--mode", mode, ", ".join(MODES))
    _must(seed is None or seed >= 0, "--seed", seed, "0 or more")
    samples = max(_LEAST_SAMPLES, math.ceil(1 / sample_rate))
    limit = 1 / (samples + 1)
    _must(
        SMALLEST_DELTA <= delta < limit,
        "--delta",
        delta,
        f"{SMALLEST_DELTA:g} up to {limit:.3g}, one over the number of samples",
    )
    return samples


def _must(holds: bool, option: str, value: object, expected: str) -> None:
    from tangent_ops.errors import ArgumentError

    if not holds:
        raise ArgumentError(f"{option} {value}: expected {expected}")
