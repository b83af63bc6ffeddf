"""Many shards take no more memory than ten, and no more bytes and time per shard."""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from ledger_contents import STATISTICS_META, add, assert_holds, numbers_of, statistics_of
from ledger_helpers import assert_tidy

from tangent_ops import Ledger, StatisticsLedger, TangentStatistics

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
@pytest.mark.parametrize(("kind", "shards"), [(Ledger, 1000), (StatisticsLedger, 300)])
def test_adding_and_forgetting_cost_one_shard_however_many_there_are(tmp_path, kind, shards):
    ledger = kind(tmp_path / "ledger")
    costs: dict[int, Counter[str]] = {}
    times: dict[int, list[float]] = {}
    for number in range(shards):
        began = time.perf_counter()
        with Reads() as added:
            add(ledger, f"{number:04}", number)
        times.setdefault(number // 100, []).append(time.perf_counter() - began)
        if number in (50, shards - 1):
            costs[number] = Counter(add=added.bytes)
            if isinstance(ledger, StatisticsLedger):
                with Reads() as forgotten:
                    ledger.forget_samples(f"{number:04}", statistics_of(numbers_of(number)[:1]))
                costs[number]["forget samples"] = forgotten.bytes
            with Reads() as forgotten:
                ledger.forget(f"{number:04}")
            costs[number]["forget"] = forgotten.bytes
            add(ledger, f"{number:04}", number)
    last = shards - 1
    print(f"\nbytes: {costs[50]} among 50 shards, {costs[last]} among {shards}")
    fastest = [min(times[part]) for part in (0, last // 100)]  # other work slows some
    print(f"seconds per add: {fastest[0]:.4f} among 100, {fastest[1]:.4f} among {shards}")
    for name in costs[last]:
        # A shard is small here; with a kilobyte per shard it would be much more.
        assert abs(costs[last][name] - costs[50][name]) < 100_000
    assert fastest[1] < 10 * fastest[0]

    assert_holds(ledger, range(shards))
    assert ledger.verify().shards == len(ledger.list()) == shards
    assert_tidy(ledger)


def large_sample(seed):
    """Random terms in 256 core columns, 8 classes and a head of 385 entries."""
    layout = (("core", "float32", (256,)), ("head.weight", "float32", (8, 384)),
              ("head.bias", "float32", (8,)))  # fmt: skip
    meta = dataclasses.replace(STATISTICS_META, layout=layout, outputs=8)
    torch.manual_seed(seed)
    terms = {n: torch.randint(-(2**30), 2**30, shape) for n, shape in meta.shapes().items()}
    for name in ("core_core", "head_head"):
        terms[name] = terms[name].triu() + terms[name].triu(1).T
    counts = torch.zeros(8, dtype=torch.int64).index_fill(0, torch.tensor(seed % 8), 1)
    return TangentStatistics(meta, terms, counts, 2**30, torch.randint(2**62, (1, 2)))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts the bytes")
def test_forgetting_a_sample_reads_and_writes_two_statistics(tmp_path):
    """Run with -s to see the times that docs/promises/ledger.md quotes."""
    ledger = StatisticsLedger(tmp_path / "ledger")
    shard = functools.reduce(operator.add, map(large_sample, range(10)))
    ledger.add("a", shard)
    (file,) = (ledger.path / "statistics").iterdir()
    size = file.stat().st_size
    clock, cpu = [], []
    for seed in range(1, 10):
        gone = large_sample(seed)
        began, worked = time.perf_counter(), time.process_time()
        with Reads() as used:
            ledger.forget_samples("a", gone)
        clock.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
        # The writes are of new files and zeros; reads of mapped files are not counted.
        assert 4 * size < used.bytes < 4.5 * size
    middle = {name: 1e3 * statistics.median(t) for name, t in (("CPU", cpu), ("clock", clock))}
    print(f"\n{size / 1e6:.1f} MB; {middle['CPU']:.0f} ms CPU, {middle['clock']:.0f} ms clock")
    assert ledger.statistics() == large_sample(0)
