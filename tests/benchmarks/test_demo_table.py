"""The demo's table: of every seed, the best of a kind."""

from __future__ import annotations

import json

import pytest

from benchmarks.demo_table import LINES, demo_table, read_demos
from benchmarks.stored import BadFile


def a_run(seed: int) -> dict:
    rows = [{"kind": kind, "accuracy": 0.5 + seed / 100} for kind in LINES]
    rows.append({"kind": "shard", "accuracy": 0.6 + seed / 100})
    about = {"model": "a ViT", "setting": "digits: 5 shards", "torch": "2.11", "date": "today"}
    return {**about, "seed": seed, "rows": rows}


def test_a_column_per_seed_in_order(tmp_path) -> None:
    for seed in (2, 1):
        (tmp_path / f"{9 - seed}.json").write_text(json.dumps(a_run(seed)))
    lines = demo_table(read_demos(tmp_path)).splitlines()
    assert lines[0] == "| model | seed 1 | seed 2 |"
    assert f"| {LINES['shard']} | 61.0 % | 62.0 % |" in lines
    assert f"| {LINES['composed']} | 51.0 % | 52.0 % |" in lines
    assert lines[-1].startswith("a ViT. digits: 5 shards; torch 2.11, today")


def test_nothing_stored(tmp_path) -> None:
    assert demo_table(read_demos(tmp_path)) == "Not measured yet."


@pytest.mark.parametrize("text", ["no json", "[]", '{"seed": 1}'])
def test_another_file_is_refused(tmp_path, text) -> None:
    (tmp_path / "seed.json").write_text(text)
    with pytest.raises(BadFile, match=r"seed.json is not a results.json of the demo"):
        read_demos(tmp_path)
