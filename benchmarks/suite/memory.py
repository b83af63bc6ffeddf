"""Peak and saved memory of a call, in a process that has done nothing else.

    MemoryProbe(device).ask(case, "ours")

A worker (`python -m benchmarks.suite.memory DEVICE`) answers: one line of JSON each way.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor

from benchmarks.record import ROOT
from benchmarks.suite.case import Case
from benchmarks.suite.measure import forget
from benchmarks.suite.registry import provider_of, workload_of
from tangent_ops.profiling.memory import peak_bytes, saved_bytes

Memory = tuple[int, int]  # bytes at the peak, bytes saved for the backward pass


class MemoryProbe:
    """Asks a fresh process; a context, because that process has to end.

    Args:
        device: where the calls run.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._worker = self._start()

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
        worker = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.suite.memory", str(self._device)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert worker.stdout is not None
        worker.stdout.readline()  # ready: until then its imports would disturb a timing
        return worker

    def ask(self, case: Case, provider: str) -> Memory | None:
        """Of one call of the provider; None if it failed there, out of memory for example."""
        assert self._worker.stdin is not None and self._worker.stdout is not None
        question = {"case": dataclasses.asdict(case), "provider": provider}
        try:
            self._worker.stdin.write(json.dumps(question) + "\n")
            self._worker.stdin.flush()
            answer = self._worker.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:  # it died of this call: the next one has another
            self._worker.communicate()
            self._worker = self._start()
            return None
        found = json.loads(answer)
        return None if found is None else (found["peak"], found["saved"])

    def __enter__(self) -> MemoryProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.kill()
        self._worker.communicate()


def measure(case: Case, provider: str, device: torch.device) -> Memory:
    """Peak and saved bytes of one call, after one that warms it up."""
    workload = workload_of(case)
    call = provider_of(case, provider).prepare(case, workload.inputs(case, device, 0))
    call()
    there = _tensors_there()
    saved = saved_bytes(call, exclude=there)
    del there
    return peak_bytes(call, device), saved


def _tensors_there() -> list[torch.Tensor]:
    """What is there anyway, parameters above all, and so is not saved by a call."""
    found = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    # What the compiler leaves of its tracing, and other layouts (oneDNN's), have no storage.
    return [x for x in found if not is_functorch_wrapped_tensor(x) and x.layout is torch.strided]


def main() -> None:
    device = torch.device(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        case = Case(**{**question["case"], "shape": tuple(question["case"]["shape"])})
        answer: dict[str, Any] | None = None
        try:
            peak, saved = measure(case, question["provider"], device)
            answer = {"peak": peak, "saved": saved}
        except Exception as problem:
            print(f"{case}, {question['provider']}: {problem}", file=sys.stderr)
        forget()  # before the answer, after which the other process needs the memory
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
