"""Shared by the tests of commands on runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shards are trained in this process."""
    from shard_runs import run_here

    monkeypatch.setattr("tangent_ops.shards.run.run_local", run_here)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a package look as if it were not installed."""

    def hide(package: str) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: None if name == package else find(name, *rest),
        )

    return hide
