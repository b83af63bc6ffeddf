"""Soups of the study: the mean of ordinary models' weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from studies.paper.parts.dealing import uniform_soup


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_a_soup_is_the_mean_rounded_once(dtype, count) -> None:
    models: list[nn.Module] = [nn.Linear(4, 8).to(dtype) for _ in range(count)]
    before = copy.deepcopy([model.state_dict() for model in models])
    soup = uniform_soup(models)
    for name, found in soup.items():
        exact = torch.as_tensor(np.mean([s[name].double().numpy() for s in before], axis=0))
        assert found.dtype == dtype
        assert ((exact - 1e-15).to(dtype) <= found).all()  # numpy may sum in another order
        assert (found <= (exact + 1e-15).to(dtype)).all()
        found.add_(1)  # the models keep their own memory
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())


def test_small_weights_are_not_lost_among_large_ones() -> None:
    models: list[nn.Module] = [nn.Linear(1, 1) for _ in range(3)]
    for model, value in zip(models, (1e8, 1.0, -1e8), strict=True):
        nn.init.constant_(model.get_parameter("weight"), value)
    assert uniform_soup(models)["weight"].item() == np.float32(1 / 3)
