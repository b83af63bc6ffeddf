"""A thousand shards take no more memory than ten, and no more bytes and time per shard."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from ledger_helpers import assert_tidy, oracle, some_delta

from tangent_ops import Ledger

ROOT = Path(__file__).resolve().parents[3]

GROWTH = """
import re, sys
from pathlib import Path
import torch
from tangent_ops import Ledger


def status(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


torch.set_num_threads(1)
for count in map(int, sys.argv[2:]):
    ledger = Ledger(Path(sys.argv[1]) / str(count))
    Path("/proc/self/clear_refs").write_text("5")  # the peak of what was before does not count
    before = status("VmRSS")
    for number in range(count):
        ledger.add(str(number), {"w": torch.full((50_000,), float(number))})
    for number in range(0, count, 2):
        ledger.forget(str(number))
    assert ledger.verify(progress=False).shards == len(ledger.list()) == count // 2
    assert ledger.composed()["w"][0] == sum(range(1, count, 2)) / (count // 2)
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux resets the peak")
def test_many_shards_take_no_more_memory_than_ten(tmp_path):
    """Peak memory of a process beyond what it had before its first shard."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path), "10", "300"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        check=True,
    )
    few, many = map(int, done.stdout.split())
    shard = 4 * 50_000
    print(f"\npeak growth: {few / 1e6:.1f} MB with 10 shards, {many / 1e6:.1f} MB with 300")
    assert many - few < 40 * shard  # if they were kept, 290 or more


class Reads:
    """Counts the bytes that this process reads and writes (Linux)."""

    def __enter__(self):
        self._before = self._now()
        return self

    def __exit__(self, *error):
        self.bytes = self._now() - self._before

    @staticmethod
    def _now():
        lines = Path("/proc/self/io").read_text().splitlines()
        counts = dict(line.split(": ") for line in lines)
        return int(counts["rchar"]) + int(counts["wchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts the bytes")
def test_adding_and_forgetting_cost_one_delta_however_many_there_are(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    costs: dict[int, Counter[str]] = {}
    times: dict[int, list[float]] = {}
    for number in range(1000):
        began = time.perf_counter()
        with Reads() as added:
            ledger.add(f"{number:04}", some_delta(number))
        times.setdefault(number // 100, []).append(time.perf_counter() - began)
        if number in (50, 999):
            with Reads() as forgotten:
                ledger.forget(f"{number:04}")
            ledger.add(f"{number:04}", some_delta(number))
            costs[number] = Counter(add=added.bytes, forget=forgotten.bytes)
    print(f"\nbytes: {costs[50]} among 50 shards, {costs[999]} among 1,000")
    first, last = (min(times[part]) for part in (0, 9))  # the fastest: other work slows some
    print(f"seconds per add: {first:.4f} among 100 shards, {last:.4f} among 1,000")
    for name in ("add", "forget"):
        # A delta is small here; with a kilobyte per shard it would be a million more.
        assert abs(costs[999][name] - costs[50][name]) < 100_000
    assert last < 10 * first

    expected = oracle((some_delta(number), 1) for number in range(1000))
    assert all(torch.equal(ledger.composed()[name], value) for name, value in expected.items())
    assert ledger.verify().shards == len(ledger.list()) == 1000
    assert_tidy(ledger)
