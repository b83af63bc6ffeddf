"""A delta of every dtype, and the header of its file."""

from __future__ import annotations

import json

import torch

from tangent_ops.delta import Delta, DeltaMeta

META = DeltaMeta(
    anchor="a" * 64,
    model="tiny",
    trainable="head",
    loss="RescaledSquareLoss",
    shard="3",
    extra={"labels": "füchse"},
)


def some_delta():
    torch.manual_seed(0)
    tensors = {
        "head.weight": torch.randn(3, 4),
        "head.bias": torch.randn(3, dtype=torch.float64),
        "scale": torch.tensor(1.5, dtype=torch.bfloat16),
        "gamma": torch.randn(5).to(torch.bfloat16),
        "half": torch.randn(1, 2, 3).half(),
        "empty": torch.empty(0, 4),
    }
    return Delta(tensors, META)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def read_header(path):
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), start
