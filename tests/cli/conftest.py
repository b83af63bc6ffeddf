"""Shared by the tests of commands on runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers are tested elsewhere, and take seconds to start."""
    import tangent_ops.shards.run
    from tangent_ops.shards import job

    def run_here(run, shards, *, on_result, **_):
        for shard in shards:
            on_result(shard, job.attempt(str(run), shard))

    monkeypatch.setattr(tangent_ops.shards.run, "run_local", run_here)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
