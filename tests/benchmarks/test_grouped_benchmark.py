"""The benchmark of grouped steps runs, and its two sides do the same work."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import grouped


def test_it_writes_a_ratio_for_each_number_of_shards(tmp_path):
    path = tmp_path / "grouped.json"
    shape = ["--model", "test_vit", "--size", "32", "--batch", "2", "--shards", "1", "3"]
    assert grouped.main([*shape, "--seconds", "0", "--out", str(path)]) == 0
    content = json.loads(path.read_text())
    assert "threads" in content["environment"]
    assert [*content["rows"]] == ["TAFT-1, cached", "TAFT-all"]
    for rows in content["rows"].values():
        assert [row["shards"] for row in rows] == [1, 3]
        assert all(row["ratio"] > 0 and row["rounds"] == 5 for row in rows)


@pytest.mark.parametrize("blocks", grouped.BLOCKS.values())
def test_both_sides_take_one_step_of_every_shard(blocks, monkeypatch):
    taken = []
    step = grouped.step
    monkeypatch.setattr(grouped, "step", lambda model, group, *rest: taken.append(len(group)))
    calls = grouped.steps("test_vit", 32, blocks, 3, 2, torch.device("cpu"))
    calls["separate"]()
    assert taken == [1, 1, 1]
    monkeypatch.setattr(grouped, "step", step)
    calls["grouped"]()
