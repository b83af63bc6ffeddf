"""How cases are measured: wrong answers are not timed, right ones in turns."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.bench_suite import Tape
from benchmarks.record import ROOT
from benchmarks.suite import measure as measuring
from benchmarks.suite.case import Case, Cost, Provider
from benchmarks.suite.measure import measure, relative_error
from benchmarks.suite.row import Result, Row
from benchmarks.timing import Timing, interleave

CPU = torch.device("cpu")
CASE = Case("linear", "double", (4,), "fp32")


class Doubling:
    """A workload whose right answer is twice its input, and the input's square."""

    groups = ("linear",)

    def __init__(self, **providers):
        self.called: list[str] = []
        self._providers = [self._provider(name, answer) for name, answer in providers.items()]

    def _provider(self, name, answer):
        def prepare(case, inputs):
            def call():
                self.called.append(name)
                return answer(inputs)

            return call

        return Provider(name, prepare, lambda case: Cost(8.0, 32.0))

    def cases(self, device, extent):
        return [CASE]

    def providers(self, case):
        return self._providers

    def inputs(self, case, device, seed):
        return torch.arange(1.0, 5.0)

    def expected(self, case, inputs):
        return 2 * inputs.double(), inputs.double().square()

    def compared(self, case, outputs):
        return outputs

    def bound(self, case):
        return 1e-6


def right(x):
    return 2 * x, x * x


def use(monkeypatch, workload) -> Doubling:
    monkeypatch.setattr(measuring, "workload_of", lambda case: workload)
    return workload


def rows(workload, names=None) -> dict[str, Row]:
    names = names or [p.name for p in workload.providers(CASE)]
    return {n: m.row for n, m in measure(CASE, names, CPU, budget=0.01).items()}


def test_a_wrong_answer_is_reported_and_never_timed(monkeypatch) -> None:
    workload = use(monkeypatch, Doubling(ours=right, rival=lambda x: (2 * x, x * x + 1e-4)))
    found = rows(workload)
    assert found["ours"].status == "ok" and found["ours"].timing is not None
    assert found["rival"].status == "wrong" and found["rival"].timing is None
    assert found["rival"].error == pytest.approx(2e-4 / math.sqrt(354), rel=1e-2)
    assert "allowed 1.0e-06" in found["rival"].note
    assert workload.called.count("rival") == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_is_wrong(monkeypatch, bad) -> None:
    found = rows(use(monkeypatch, Doubling(rival=lambda x: (2 * x, x * bad))))
    assert found["rival"].status == "wrong"


def test_what_raises_has_failed(monkeypatch) -> None:
    def broken(x):
        raise RuntimeError("no kernel\n  for this")

    def full(x):
        raise torch.OutOfMemoryError("CUDA out of memory: tried 100 GB")

    found = rows(use(monkeypatch, Doubling(ours=right, broken=broken, full=full)))
    assert found["broken"].status == "failed"
    assert found["broken"].note == "RuntimeError: no kernel for this"
    assert (found["full"].status, found["full"].note) == ("failed", "out of memory")


def test_without_room_for_the_exact_answer_nothing_is_timed(monkeypatch) -> None:
    workload = use(monkeypatch, Doubling(ours=right, rival=right))

    def full(case, inputs):
        raise torch.OutOfMemoryError("tried 100 GB")

    monkeypatch.setattr(workload, "expected", full)
    found = rows(workload)
    assert {row.status for row in found.values()} == {"failed"}
    assert "not checked" in found["ours"].note and workload.called == []


def test_who_does_not_fit_beside_the_others_is_left_out(monkeypatch) -> None:
    calls = []

    def hungry(x):
        calls.append(x)
        if len(calls) > 1:  # alone, while it is checked, it fits
            raise torch.OutOfMemoryError("tried 100 GB")
        return right(x)

    found = rows(use(monkeypatch, Doubling(ours=right, hungry=hungry)))
    assert found["ours"].status == "ok" and found["ours"].timing is not None
    assert (found["hungry"].status, found["hungry"].timing) == ("failed", None)
    assert "beside the other" in found["hungry"].note


def test_another_shape_is_no_answer(monkeypatch) -> None:
    found = rows(use(monkeypatch, Doubling(rival=lambda x: (2 * x[:3], x * x))))
    assert found["rival"].status == "failed" and "shape (3,)" in found["rival"].note


def test_who_cannot_answer_is_absent(monkeypatch) -> None:
    workload = use(monkeypatch, Doubling(ours=right))
    workload._providers[0] = replace(workload._providers[0], why_not=lambda c, d: "not today")
    found = rows(workload)
    assert (found["ours"].status, found["ours"].note) == ("absent", "not today")
    assert workload.called == []


def test_slack_is_for_approximations(monkeypatch) -> None:
    workload = use(monkeypatch, Doubling(rough=lambda x: (2 * x, x * x * 1.0001)))
    assert rows(workload)["rough"].status == "wrong"
    workload._providers[0] = replace(workload._providers[0], slack=1e3)
    assert rows(workload)["rough"].status == "ok"


def test_only_the_named_are_measured(monkeypatch) -> None:
    workload = use(monkeypatch, Doubling(ours=right, rival=right))
    assert list(rows(workload, ["rival"])) == ["rival"]
    assert "ours" not in workload.called


def test_rivals_take_turns(monkeypatch) -> None:
    workload = use(monkeypatch, Doubling(ours=right, rival=right))
    rows(workload)
    assert workload.called[2:] == ["ours", "rival"] * (len(workload.called) // 2 - 1)


def test_a_yardstick_may_answer_less() -> None:
    two = torch.ones(3), torch.ones(3)
    assert relative_error(two[:1], two) == 0.0
    assert relative_error((), two) is None


def test_times_are_those_of_the_calls() -> None:
    calls = {"short": [lambda: time.sleep(0.002)], "long": [lambda: time.sleep(0.02)]}
    found = interleave(calls, device=CPU, budget=0.0, rounds=(5, 50))
    assert {name: len(seconds) for name, seconds in found.items()} == {"short": 5, "long": 5}
    assert min(found["long"]) >= 0.02 > 0.002 <= min(found["short"])


def test_operands_take_turns() -> None:
    seen: list[int] = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    interleave({"one": calls}, device=CPU, budget=0.0, rounds=(6, 6), warmup=0)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_quartiles() -> None:
    assert Timing.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Timing(3.0, 2.0, 4.0, 5)
    with pytest.raises(ValueError, match="1 calls have no quartiles"):
        Timing.of([1.0])


def test_the_tape_plays_what_was_measured() -> None:
    tape = Tape()
    tape.load([0.25, 0.5])
    played = []
    for _ in range(2):
        start = tape()
        played.append(tape() - start)
    assert played == [0.25, 0.5]


def test_a_result_survives_json() -> None:
    case = Case("attention-forward", "attention", (2, 3, 5, 8), "bf16", causal=True)
    timed = Row(case, "ours", "ok", error=1e-3, timing=Timing(2.0, 1.0, 3.0, 9), flops=4.0)
    graph = replace(timed, graph=Timing(1.0, 0.5, 1.5, 9), peak_bytes=10, saved_bytes=0)
    missing = Row(case, "rival", "absent", "not installed")
    result = Result({"cpu": "x"}, {"bytes/s": 1.0}, [timed, graph, missing])
    assert Result.from_json(result.to_json()) == result
    assert Result.from_json({"tangent_ops": result.to_json()}) == result
    assert [row.seconds for row in result.rows] == [2.0, 1.0, None]


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_forget_gives_memory_back_that_malloc_was_told_to_keep() -> None:
    script = """
import torch
from benchmarks.suite.measure import forget
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
before = resident()
tensors = [torch.ones(2**18) for _ in range(200)]
del tensors
kept = resident()
forget()
print(kept - before, resident() - before)
"""
    keep = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    printed = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **keep, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kept, left = map(int, printed.split())
    assert kept > 150 and left < 100, printed
