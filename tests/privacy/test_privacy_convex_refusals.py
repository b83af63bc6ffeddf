"""What would void the convex mechanisms' guarantee in silence is refused before any work."""

from __future__ import annotations

import pytest
import torch
from bounded_problem import samples, tangent
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

pytest.importorskip("opacus", reason="the extra for privacy is not installed")
pytest.importorskip("dp_accounting", reason="the extra for privacy is not installed")

from tangent_ops import linearize
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.privacy.convex.last_iterate import fit_last_iterate
from tangent_ops.privacy.convex.output_perturbation import perturb_output

OPTIONS = {
    "l2": 1.0,
    "jacobian_bound": 2.0,
    "residual_bound": 3.0,
    "delta": 1e-5,
    "noise_multiplier": 1.0,
    "progress": False,
}
FITS = [lambda *of, **more: fit_last_iterate(*of, steps=2, **OPTIONS, **more)]
FITS.append(lambda *of, **more: perturb_output(*of, **OPTIONS, **more))


@pytest.mark.parametrize("fit", FITS)
def test_a_sample_that_is_in_the_data_twice(fit):
    """It would move the result by twice the sensitivity."""
    with pytest.raises(ArgumentError, match="one sample 2 times"):
        fit(tangent(), Subset(samples(), [0, 1, 2, 1]))
    x, y = samples().tensors
    copy = TensorDataset(torch.cat([x, x[3:4]]), torch.cat([y, 1 - y[3:4]]))
    for data in (copy, DataLoader(copy, batch_size=2)):
        with pytest.raises(ArgumentError, match=f"one sample 2 times: the inputs 3 and {len(x)}"):
            fit(tangent(), data)


@pytest.mark.parametrize("fit", FITS)
def test_inputs_that_were_standardised_by_their_own_statistics(fit):
    x, y = samples().tensors
    x = (x - x.mean(0)) / x.std(0)
    with pytest.raises(UnsupportedError, match="public_preprocessing=True"):
        fit(tangent(), TensorDataset(x, y))
    fit(tangent(), TensorDataset(x, y), public_preprocessing=True)


@pytest.mark.parametrize("fit", FITS)
def test_a_batch_norm_that_uses_its_batch(fit):
    """Its Jacobian of one sample alone would bound nothing."""
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    mixing = linearize(nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2)).double())
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedError, match="batch norm"):
        fit(mixing, TensorDataset(x, torch.arange(6) % 2))
