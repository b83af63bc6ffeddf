"""One commit's process, and the handle to it: cases listed, checked and called on request.

    PYTHONPATH=BENCHMARKS:WORKTREE:WORKTREE/kernels python -m benchmarks.compare_worker cpu

Requests and answers are JSON, one a line, on stdin and stdout. Torch is imported by the process
itself, after what libraries print has been led to stderr.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.processes import started

# As in the Makefile: whether glibc hands a call's memory back is luck, and costs up to a tenth.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}
PACKAGES = ("tangent_ops", "tangent_kernels")
STDERR_LINES = 12


class WorkerDied(Exception):
    """The process ended; the message shows its last words."""


class RequestFailed(Exception):
    """The process lives, and what was asked of it raised; the message is one line."""


@contextlib.contextmanager
def started_worker(name: str, worktree: Path, folder: Path, device: str) -> Iterator[Worker]:
    """A process that has a commit's packages; it is killed on leaving.

    Args:
        name: for messages: "base 1a2b3c4d5e6f".
        worktree: the commit's checkout.
        folder: what holds the `benchmarks` package to use; it goes before the worktree.
        device: "cpu" or "cuda".
    """
    said = folder / f"{worktree.name}.stderr"
    environment = {"PYTHONPATH": search_path(folder, worktree)}
    with (
        said.open("wb") as stderr,
        started(
            [sys.executable, "-m", f"benchmarks.{Path(__file__).stem}", device],
            cwd=folder,
            env=KEEP_MEMORY | dict(os.environ) | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        ) as process,
    ):
        yield Worker(name, process, said)


class Worker:
    """The handle to a process.

    Args:
        name: for messages.
        process: runs this module.
        said: the file of its stderr.
    """

    def __init__(self, name: str, process: subprocess.Popen[str], said: Path) -> None:
        self.name = name
        self._process = process
        self._said = said

    def ask(self, do: str, *arguments: str) -> dict[str, Any]:
        """The answer to a request: a method's name of `_Bench`, and what it takes.

        Raises:
            RequestFailed: it raised.
            WorkerDied: the process ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps([do, *arguments]) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerDied(self._last_words(" ".join([do, *arguments])))
        answer = json.loads(line)
        if "failed" in answer:
            raise RequestFailed(answer["failed"])
        return answer

    def _last_words(self, request: str) -> str:
        code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        lines = self._said.read_text(errors="replace").splitlines()[-STDERR_LINES:]
        said = "\n".join(f"    {line}" for line in lines) or "    (nothing)"
        return f"the worker of {self.name} died ({how}) at `{request}`; its last lines:\n{said}"


def search_path(*folders: Path) -> str:
    """PYTHONPATH with each folder and its kernels/, then what it was before."""
    found = [str(place) for folder in folders for place in (folder, folder / "kernels")]
    return os.pathsep.join(filter(None, [*found, os.environ.get("PYTHONPATH")]))


class _Bench:
    """What the process can be asked for."""

    def __init__(self, device: str) -> None:
        self._name = device
        self._call: Any = None

    def cases(self) -> dict[str, Any]:
        """Every case with its providers' names; where the packages come from; the machine."""
        registry, record = self._import("suite.registry"), self._import("record")
        self._device = importlib.import_module("torch").device(self._name)
        self._cases = {
            f"{case.group} {case}": case for case in registry.all_cases(self._device, "full")
        }
        packages = {name: importlib.util.find_spec(name) for name in PACKAGES}
        return {
            "cases": {
                name: [p.name for p in registry.workload_of(case).providers(case)]
                for name, case in self._cases.items()
            },
            "packages": {name: found and found.origin for name, found in packages.items()},
            "environment": record.environment(self._device),
        }

    def prepare(self, name: str, provider_name: str) -> dict[str, Any]:
        """Makes the call that `time` times, and checks what it gives."""
        self._call = None
        gc.collect()
        registry = self._import("suite.registry")
        relative_error = self._import("suite.measure").relative_error
        case = self._cases[name]
        provider = registry.provider_of(case, provider_name)
        workload = registry.workload_of(case)
        if reason := provider.why_not(case, self._device):
            return {"status": "absent", "note": reason}
        inputs = workload.inputs(case, self._device, 0)
        call = provider.prepare(case, inputs)
        found = workload.compared(case, call())
        error = relative_error(found, workload.expected(case, inputs))
        bound = workload.bound(case) * provider.slack
        if error is not None and not error <= bound:  # a NaN is wrong, too
            return {"status": "wrong", "note": f"error {error:.1e}, allowed {bound:.1e}"}
        self._call = call
        return {"status": "ok", "note": ""}

    def time(self) -> dict[str, Any]:
        """Seconds of one call, after one untimed: the other process has had the caches since."""
        interleave = self._import("timing").interleave
        once = {"it": [self._call]}
        taken = interleave(once, device=self._device, budget=0.0, rounds=(1, 1), warmup=1)
        return {"seconds": taken["it"][0]}

    @staticmethod
    def _import(name: str) -> Any:
        """Late: the old commit may lack what the suite imports, which is an answer, not an end."""
        return importlib.import_module(f"benchmarks.{name}")


def main() -> None:
    # The protocol keeps the real stdin and stdout; whoever prints or reads gets others.
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    bench = _Bench(sys.argv[1])
    for line in requests:  # ends when the parent does, however that was
        do, *arguments = json.loads(line)
        try:
            answer = getattr(bench, do)(*arguments)
        except Exception as problem:  # the parent decides what it means
            traceback.print_exc()
            answer = {"failed": " ".join(f"{type(problem).__name__}: {problem}".split())[:200]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
