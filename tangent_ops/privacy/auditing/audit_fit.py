"""Audit `fit_private` on a model and data of yours, with a canary that is made for it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from tangent_ops.data import check_integer
from tangent_ops.errors import ArgumentError
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.auditing.audit import Audit, audit, check_runs
from tangent_ops.privacy.auditing.canary import canary_score, make_canary
from tangent_ops.privacy.checks import check_dataset, check_model, check_positive
from tangent_ops.privacy.fit import PrivateFit, fit_private

_TIMES = 1000.0  # max_grad_norm, is the canary's gradient


def audit_fit(
    tangent: LinearizedModel,
    dataset: Dataset[Any],
    inputs: Tensor,
    *,
    sample_rate: float,
    max_grad_norm: float,
    lr: float,
    runs: int = 400,
    confidence: float = 0.95,
    seed: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Audit:
    """Train by `fit_private` from zero, with and without a canary, and check its own statement.

    The loss is `torch.nn.MSELoss`, see `make_canary`; the optimizer is "sgd" unless `options` say
    otherwise, for which `canary_score` is as good as an attack can be. Both sides have the same
    sample rate and lr / E, as in the definition of privacy, where these are public.

    Args:
        tangent: the model; a copy of it is trained.
        dataset: the other samples, (input, target), targets shaped as the model's output.
        inputs: (1, ...): the canary's; not among the others'.
        sample_rate: q; at least 1 over the number of the others.
        max_grad_norm: as in `fit_private`.
        lr: as in `fit_private`, with the canary.
        runs: as in `audit`.
        confidence: as in `audit`.
        seed: for runs that are repeated to the bit; None: the operating system draws.
        progress: show a progress bar.
        options: the others of `fit_private`: delta, steps, noise_multiplier or target_epsilon,
            mode, and so on.

    Returns:
        What was found.

    Raises:
        ArgumentError: an argument other than these.
        UnsupportedError: as `fit_private`.
    """
    check_runs(runs, confidence)
    check_model(tangent)
    others = check_dataset(dataset, bool(options.get("public_preprocessing")))
    check_positive(max_grad_norm=max_grad_norm, lr=lr)
    if not 1 / others <= sample_rate <= 1:
        raise ArgumentError(
            f"sample_rate must be from 1/{others} (one over the number of samples beside the "
            f"canary) to 1, got {sample_rate}"
        )
    if seed is not None:
        check_integer("seed", seed, 0)
    for name in ("loss", "expected_batch_size", "start", "checkpoint"):
        if name in options:
            raise ArgumentError(f"{name} is not an option of an audit: it sets that itself")
    options = {"optimizer": "sgd", **options}
    tangent = copy.deepcopy(tangent)
    loss = nn.MSELoss()
    inputs, target = make_canary(tangent, inputs, _TIMES * max_grad_norm)
    score = canary_score(tangent, inputs, target, loss)
    everything = ConcatDataset([dataset, TensorDataset(inputs, target)])
    rate_of_lr = lr / (sample_rate * (others + 1))

    def train(with_canary: bool, run: int) -> PrivateFit:
        data = everything if with_canary else dataset
        expected = sample_rate * (others + with_canary)
        return fit_private(
            _at_zero(tangent),
            data,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected,
            lr=rate_of_lr * expected,
            loss=loss,
            seed=None if seed is None else seed * (runs + 1) + run,
            progress=False,
            **options,
        )

    claim = train(True, runs).statement
    return audit(
        lambda with_canary, run: score(train(with_canary, run).delta),
        claim,
        runs=runs,
        confidence=confidence,
        progress=progress,
    )


def _at_zero(tangent: LinearizedModel) -> LinearizedModel:
    with torch.no_grad():
        for delta in tangent.deltas().values():
            delta.zero_()
    return tangent
