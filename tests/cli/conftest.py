"""Shared by the tests of commands on runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without workers."""
    from shard_runs import run_here

    monkeypatch.setattr("tangent_ops.shards.run.run_local", run_here)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
