"""The convex mechanisms refuse data and models for which their guarantee does not hold."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from bounded_problem import private, samples, tangent
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from tangent_ops import linearize
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.privacy.convex.last_iterate import fit_last_iterate
from tangent_ops.privacy.convex.output_perturbation import perturb_output

OPTIONS = {
    "l2": 1.0,
    "jacobian": 2.0,
    "residual": 3.0,
    "delta": 1e-5,
    "noise_multiplier": 1.0,
    "progress": False,
}
FITS = [
    partial(private, fit_last_iterate, steps=2, **OPTIONS),
    partial(private, perturb_output, **OPTIONS),
]
pytestmark = pytest.mark.parametrize("fit", FITS)


def test_a_sample_that_is_in_the_data_twice(fit):
    """It would move the result by twice the sensitivity."""
    with pytest.raises(ArgumentError, match="one sample 2 times"):
        fit(tangent(), Subset(samples(), [0, 1, 2, 1]))
    x, y = samples().tensors
    copy = TensorDataset(torch.cat([x, x[3:4]]), torch.cat([y, 1 - y[3:4]]))
    for data in (copy, DataLoader(copy, batch_size=2)):
        with pytest.raises(ArgumentError, match=f"one sample 2 times: the inputs 3 and {len(x)}"):
            fit(tangent(), data)


def test_inputs_that_were_standardised_by_their_own_statistics(fit):
    x, y = samples().tensors
    x = (x - x.mean(0)) / x.std(0)
    with pytest.raises(UnsupportedError, match="public_preprocessing=True"):
        fit(tangent(), TensorDataset(x, y))
    fit(tangent(), TensorDataset(x, y), public_preprocessing=True)


def test_a_batch_norm_that_uses_its_batch(fit):
    """Such a norm mixes samples, so the Jacobian of one sample bounds nothing."""
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    mixing = linearize(nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2)).double())
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedError, match="batch norm"):
        fit(mixing, TensorDataset(x, torch.arange(6) % 2))


def test_fields_of_privacy_that_it_does_not_use(fit):
    for field, value in {"max_grad_norm": 1.0, "expected_batch_size": 8, "start": "public"}.items():
        with pytest.raises(ArgumentError, match=f"does not use {field}"):
            fit(tangent(), samples(), **{field: value})
