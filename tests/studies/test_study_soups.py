"""Compositions of ordinary models: soups, task arithmetic and TIES, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from studies.paper.parts.soups import DENSITY, mean_delta, ties_delta, with_delta


def _models(count: int, dtype: torch.dtype) -> tuple[Any, list[nn.Module]]:
    torch.manual_seed(0)
    anchor, *models = (nn.Linear(4, 8).to(dtype) for _ in range(count + 1))
    return anchor, models


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_a_soup_is_the_mean_rounded_once(dtype, count) -> None:
    anchor, models = _models(count, dtype)
    soup = with_delta(anchor, mean_delta(anchor, models)).state_dict()
    for name, found in soup.items():
        exact = np.mean([m.state_dict()[name].double().numpy() for m in models], axis=0)
        exact = torch.as_tensor(exact)
        assert found.dtype == dtype
        assert ((exact - 1e-14).to(dtype) <= found).all()  # sums may have another order
        assert (found <= (exact + 1e-14).to(dtype)).all()


def test_a_factor_moves_along_the_line_from_the_anchor() -> None:
    anchor, models = _models(2, torch.float64)
    delta = mean_delta(anchor, models)
    twice = with_delta(anchor, {name: 2 * value for name, value in delta.items()}).state_dict()
    once, start = with_delta(anchor, delta).state_dict(), anchor.state_dict()
    for name, value in twice.items():
        torch.testing.assert_close(value - start[name], 2 * (once[name] - start[name]))


def test_ties_trims_elects_and_merges() -> None:
    """By its paper's three steps, one entry after the other."""
    anchor, models = _models(3, torch.float64)
    found = ties_delta(anchor, models)["weight"]
    deltas = np.stack([(m.weight - anchor.weight).detach().numpy() for m in models])  # type: ignore
    kept = int(DENSITY * deltas[0].size)
    for delta in deltas:
        smallest = np.sort(np.abs(delta).ravel())[-kept]
        delta[np.abs(delta) < smallest] = 0
    expected = np.zeros(deltas[0].shape)
    for where in np.ndindex(expected.shape):
        values = deltas[(slice(None), *where)]
        agreeing = values[np.sign(values) == np.sign(values.sum())]
        agreeing = agreeing[agreeing != 0]
        expected[where] = agreeing.mean() if len(agreeing) else 0.0
    assert (expected != 0).sum() >= kept
    torch.testing.assert_close(found, torch.as_tensor(expected))


def test_the_models_are_not_changed() -> None:
    anchor, models = _models(2, torch.float32)
    before = [m.state_dict()["weight"].clone() for m in (anchor, *models)]
    with_delta(anchor, mean_delta(anchor, models)).state_dict()["weight"].add_(1)
    for model, old in zip((anchor, *models), before, strict=True):
        assert torch.equal(model.state_dict()["weight"], old)
