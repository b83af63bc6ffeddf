"""The simulation of many shards, of few."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from benchmarks import shards_scale
from benchmarks.shards_scale import STEPS, measure, scale_table
from tangent_ops.shards import Plan


def test_a_few_shards(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = measure(12, tmp_path / "one")
    assert list(row["seconds"]) == list(STEPS)
    plan = Plan.open(tmp_path / "one" / "run")
    assert [shard.samples for shard in plan.shards()] == [2] * 12
    assert all(shard.done for shard in plan.shards())
    environment = {"cpu": "c", "torch": "t", "commit": "h", "date": "d"}
    content = {"environment": environment, "images of a shard": 2, "rows": [row, row]}
    content = json.loads(json.dumps(content))
    assert scale_table(content).count("12 shards") == 2
    shards_scale.draw(content, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_worker_reads_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that SQLite hands out for one job, in a plan of 5 shards and in one of 50."""
    counts = []
    for shards in (5, 50):
        measure(shards, tmp_path / str(shards))
        rows = []
        real = sqlite3.connect

        def connect(*args, real=real, rows=rows, **kwargs):
            connection = real(*args, **kwargs)
            connection.row_factory = lambda _, row: rows.append(row) or row
            return connection

        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", connect)
            Plan.open(tmp_path / str(shards) / "run").job("customer-3")
        counts.append(len(rows))
    assert counts[0] == counts[1] > 2
