"""`audit_fit`: audits `fit_private` on a given model and data, with a canary made for them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from tangent_ops.data import check_positive
from tangent_ops.errors import ArgumentError
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.auditing.audit import Audit, audit, check_runs
from tangent_ops.privacy.auditing.canary import canary_score, make_canary
from tangent_ops.privacy.checks import check_dataset, check_model
from tangent_ops.privacy.fit import PrivateFit, fit_private
from tangent_ops.privacy.options import Privacy

_TIMES = 1000.0  # the norm of the canary's gradient over max_grad_norm


def audit_fit(
    tangent: LinearizedModel,
    dataset: Dataset[Any],
    inputs: Tensor,
    privacy: Privacy,
    *,
    sample_rate: float,
    lr: float,
    runs: int = 400,
    confidence: float = 0.95,
    progress: bool = True,
    **options: Any,
) -> Audit:
    """Train by `fit_private` from zero, with and without a canary, and audit its statement.

    The loss is `torch.nn.MSELoss`, see `make_canary`. The optimizer is "sgd" unless `options` has
    another one; for "sgd", `canary_score` is the best attack. Trainings with and without the canary
    have the same sample rate and lr / E, which the definition of privacy takes as public.

    Args:
        tangent: the model; a copy of it is trained.
        dataset: the other samples, (input, target), targets shaped as the model's output.
        inputs: (1, ...): the canary's input, which is not in dataset.
        privacy: the options that are audited; expected_batch_size follows from sample_rate, start
            is "zero". A seed makes the audit repeatable bit for bit.
        sample_rate: q; at least one over the number of samples in dataset.
        lr: of trainings with the canary, as in `fit_private`.
        runs: as in `audit`.
        confidence: as in `audit`.
        progress: show a progress bar.
        options: other keywords of `fit_private`: optimizer, l2, schedule, mode and so on.

    Returns:
        The rates, the bounds, and whether the claim stands.

    Raises:
        ArgumentError: an invalid argument.
        UnsupportedError: as `fit_private`.
    """
    check_runs(runs, confidence)
    check_model(tangent)
    others = check_dataset(dataset, privacy.public_preprocessing)
    check_positive(lr=lr)
    if privacy.max_grad_norm is None:
        raise ArgumentError("audit_fit needs clipped gradients: give Privacy(max_grad_norm=)")
    if not 1 / others <= sample_rate <= 1:
        raise ArgumentError(
            f"sample_rate must be from 1/{others} (one over the number of samples beside the "
            f"canary) to 1, got {sample_rate}"
        )
    privacy.check_unused("audit_fit", "expected_batch_size", "start")
    for name in ("recipe", "loss", "checkpoint"):
        if name in options:
            raise ArgumentError(f"{name} is not an option of an audit: leave it out")
    options = {"optimizer": "sgd", **options}
    tangent = copy.deepcopy(tangent)
    loss = nn.MSELoss()
    inputs, target = make_canary(tangent, inputs, _TIMES * privacy.max_grad_norm)
    score = canary_score(tangent, inputs, target, loss)
    everything = ConcatDataset([dataset, TensorDataset(inputs, target)])
    rate_of_lr = lr / (sample_rate * (others + 1))

    def train(with_canary: bool, run: int) -> PrivateFit:
        data = everything if with_canary else dataset
        expected = sample_rate * (others + with_canary)
        seed = None if privacy.seed is None else privacy.seed * (runs + 1) + run
        return fit_private(
            _at_zero(tangent),
            data,
            replace(privacy, expected_batch_size=expected, seed=seed),
            lr=rate_of_lr * expected,
            loss=loss,
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
