"""Runs the steps of a part, each a process with a time limit, and archives what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from tools.gpu_check import summary
from tools.gpu_check.step import Outcome, Step
from tools.machine import ROOT

USUAL = 540.0  # seconds of a part, for which the limits of its steps are given
GRACE = 20.0  # seconds that a step has to write its results after it is interrupted
SAVED_EVERY = 20.0  # seconds between archives while a step runs
LEAST = 5.0  # seconds: a step for which fewer are left is not started
TAIL = 15  # lines of a failed step's log that are shown


def run(part: str, steps: Sequence[Step], out: Path, seconds: float) -> int:
    """0 if every step came to its end well, else 1; writes OUT/PART.tar.gz."""
    archive, start = out / f"{part}.tar.gz", time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix=f"gpu-check-{part}-") as name:
        folder = Path(name)
        for step in steps:
            left = seconds - GRACE - (time.monotonic() - start)
            limit = step.seconds * seconds / USUAL
            outcomes.append(_run(step, folder, min(limit, left), archive))
            print(f"  {outcomes[-1].step:<24} {outcomes[-1].state}", flush=True)
            _write(folder / "steps.json", json.dumps([*map(asdict, outcomes)], indent=1))
            _save(folder, archive)
        text = summary.text(part, outcomes, folder)
        _write(folder / "summary.txt", text)
        _save(folder, archive)
    print(f"\n{text}\n{archive}")
    return int(any(one.state != "ok" for one in outcomes))


def _run(step: Step, folder: Path, limit: float, archive: Path) -> Outcome:
    if limit < LEAST:
        return Outcome(step.name, "not started: no time is left")
    start = time.monotonic()
    log = folder / f"{step.name.replace(' ', '-')}.log"
    command = [word.replace("{out}", str(folder)) for word in step.command]
    more = {key: value.replace("{out}", str(folder)) for key, value in step.environment.items()}
    with log.open("w", encoding="utf-8") as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | more, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True, preexec_fn=_interruptible,
            )  # fmt: skip
        except FileNotFoundError:
            return Outcome(step.name, f"not started: {command[0]} is not installed")
        try:
            status = _wait(process, start + limit, lambda: _save(folder, archive))
        finally:
            _end(process.pid)  # and what it has started
            process.wait()
    took = time.monotonic() - start
    if status == 0:
        return Outcome(step.name, "ok", took)
    if status is None:
        return Outcome(step.name, f"cut after {limit:.0f} s", took)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    print("\n".join(lines[-TAIL:]), file=sys.stderr)
    return Outcome(step.name, f"failed (exit status {status})", took)


def _wait(process: subprocess.Popen, deadline: float, meanwhile: Callable[[], None]) -> int | None:
    """The exit status; None if the process was interrupted, and killed if that did not help."""
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(SAVED_EVERY, left))
        meanwhile()
    process.send_signal(signal.SIGINT)  # pytest then writes what it has measured
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    return None


def _interruptible() -> None:
    """A shell that runs this in the background has made it ignore SIGINT, and so its steps."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def _save(folder: Path, archive: Path) -> None:
    """The folder as an archive, which is whole at any time."""
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as file:
        file.add(folder, archive.name.removesuffix(".tar.gz"), filter=_no_bytecode)
    partial.replace(archive)


def _no_bytecode(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if entry.name.endswith("__pycache__") else entry
