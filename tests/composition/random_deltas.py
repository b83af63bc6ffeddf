"""Random deltas of a tangent model."""

import torch

from tangent_ops import Delta, LinearizedModel


def random_deltas(tangent: LinearizedModel, count: int, scale: float = 1.0) -> list[Delta]:
    torch.manual_seed(2)
    own = tangent.delta_dict()
    return [
        Delta({name: scale * torch.randn_like(value) for name, value in own.items()}, own.meta)
        for _ in range(count)
    ]
