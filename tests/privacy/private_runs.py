"""Short private fits of a small vision transformer."""

from __future__ import annotations

from dataclasses import fields

import torch
from small_models import images, vit
from torch import Tensor
from torch.utils.data import TensorDataset

from tangent_ops import last_blocks, linearize
from tangent_ops.privacy.fit import PrivateFit, fit_private
from tangent_ops.privacy.options import Privacy

COUNT = 30
FIELDS = {field.name for field in fields(Privacy)}


def a_tangent(dtype=torch.float32):
    model = vit(depth=1, embed_dim=12, num_heads=2).to(dtype)
    return linearize(model, last_blocks(model, 1))


def data(count=COUNT, dtype=torch.float32) -> TensorDataset:
    return TensorDataset(images(count).to(dtype), torch.arange(count) % 5)


def run(tangent=None, dataset=None, **options) -> PrivateFit:
    options = {
        "delta": 1e-3,
        "max_grad_norm": 1.0,
        "noise_multiplier": 1.0,
        "expected_batch_size": 8,
        "steps": 5,
        "seed": 0,
        "progress": False,
        **options,
    }
    privacy = Privacy(**{name: options.pop(name) for name in FIELDS & options.keys()})
    dataset = data() if dataset is None else dataset
    return fit_private(tangent or a_tangent(), dataset, privacy, **options)


def flat(delta) -> Tensor:
    return torch.cat([value.double().flatten() for value in delta.values()])
