"""Delta files, and a small problem for least-squares weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from random_deltas import random_deltas
from torch import nn
from torch.utils.data import TensorDataset

import tangent_ops
from tangent_ops.delta import Delta, load_delta, save_delta


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Iterable[Delta]], list[Path]]:
    """Writes each delta to a file; returns the paths."""

    def save(deltas: Iterable[Delta]) -> list[Path]:
        paths = []
        for shard, delta in enumerate(deltas):
            paths.append(tmp_path / f"{shard}.safetensors")
            save_delta(delta, paths[-1])
        return paths

    return save


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str | Path]:
    """The delta files opened so far; fails if one is opened while an earlier delta is alive."""
    alive, opened = weakref.WeakSet(), []

    def spy(path: str | Path) -> Delta:
        assert len(alive) == 0, f"an earlier delta is alive when {path} is opened"
        delta = load_delta(path)
        alive.update(delta.values())
        opened.append(path)
        return delta

    monkeypatch.setattr("tangent_ops.delta.load_delta", spy)
    return opened


@pytest.fixture(scope="module")
def tangent() -> tangent_ops.LinearizedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    tangent = tangent_ops.linearize(model)
    with torch.no_grad():
        for delta in tangent.deltas().values():
            delta.normal_()  # the model's own deltas must not count
    return tangent


@pytest.fixture(scope="module")
def deltas(tangent: tangent_ops.LinearizedModel) -> list[Delta]:
    return random_deltas(tangent, 4)


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    torch.manual_seed(1)
    inputs = torch.randn(23, 4, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(3, (23,)))
