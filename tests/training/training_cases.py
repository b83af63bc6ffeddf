"""Models and data that the tests of training share."""

import random

import numpy as np
import small_models
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tangent_ops import History, fit


def quiet(*args, **options) -> History:
    return fit(*args, progress=False, **options)


def tiny_vit(**options):
    model = small_models.tiny_vit(depth=3, **options)
    with (
        torch.no_grad()
    ):  # timm's initial weights are so small that outputs hardly depend on the image
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


def images(count=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    targets = torch.arange(count) % 5
    inputs = torch.randn(count, 3, 16, 16, generator=generator, dtype=dtype)
    return TensorDataset(inputs + 0.1 * targets[:, None, None, None], targets)


def vectors(count=12, classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(count, 4, generator=generator, dtype=dtype)
    return TensorDataset(inputs, torch.arange(count) % classes)


def linear(**options):
    torch.manual_seed(3)
    return nn.Linear(4, 3, **options).double()


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def generator_states():
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())
