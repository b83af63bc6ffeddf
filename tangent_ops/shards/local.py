"""The local executor: shards are trained by workers on this machine, some at a time."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tangent_ops.errors import ArgumentError, WorkerError
from tangent_ops.shards.job import environment

_STARTS = 10  # how often in a row a start that a signal ended is tried again

Result = Callable[[str, dict[str, Any]], None]  # called with a shard and what `attempt` returned


def run_local(
    run: Path,
    shards: Sequence[str],
    *,
    workers: int | None,
    threads: int,
    retries: int,
    progress: bool,
    on_result: Result,
) -> None:
    """Train shards in processes of `tangent_ops.shards.worker`, at most `workers` at a time.

    Each worker has its own cores, if there are enough, or its own GPU. With progress, workers show
    their bars; those of several workers would overwrite one another.

    Raises:
        ArgumentError: more workers than GPUs.
        WorkerError: a worker cannot be started.
    """
    places = _places(workers, threads)
    waiting = deque(shards)
    deaths: dict[str, int] = dict.fromkeys(shards, 0)
    with (
        _team(run, places[: len(shards)], threads, progress) as team,
        selectors.DefaultSelector() as events,
    ):

        def give(worker: _Worker) -> None:
            worker.shard = waiting.popleft() if waiting else None
            if worker.shard is not None:
                worker.send(worker.shard)

        def lost(shard: str, how: str) -> None:
            deaths[shard] += 1
            if deaths[shard] <= retries:
                waiting.append(shard)
                return
            on_result(shard, {"error": died(how, deaths[shard])})

        for worker in team:
            events.register(worker.answers, selectors.EVENT_READ, worker)
        while waiting or any(worker.shard for worker in team):
            for worker in team:
                if worker.ready and worker.shard is None:
                    give(worker)
            for key, _ in events.select():
                worker: _Worker = key.data
                answer = worker.read()
                if answer is None:  # its process has ended
                    events.unregister(worker.answers)
                    shard = worker.restart()
                    events.register(worker.answers, selectors.EVENT_READ, worker)
                    if shard is not None:
                        lost(shard, "it was killed")
                elif "ready" in answer:
                    worker.ready = True
                elif worker.shard is not None:
                    shard, worker.shard = worker.shard, None
                    if "died" in answer:
                        lost(shard, answer["died"])
                    else:
                        on_result(shard, answer)


def died(how: str, times: int) -> str:
    """The message for a shard whose processes died before it was trained."""
    return (
        f"its process died {times} times ({how}): signal 9 often means that the machine ran out of "
        "memory. Fewer workers, or a smaller batch_size, may fit"
    )


class _Worker:
    """A process of `tangent_ops.shards.worker`, and the shard that it trains."""

    def __init__(self, run: Path, place: dict[str, Any], threads: int, progress: bool) -> None:
        self.shard: str | None = None
        self.ready = False
        self._failed_starts = 0
        self._run, self._place, self._threads, self._progress = run, place, threads, progress
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115
        self._start()

    def _start(self) -> None:
        env = environment(self._threads) | self._place["env"]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        cpus = self._place["cpus"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tangent_ops.shards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if self._progress else self._messages,
            env=env,
            start_new_session=True,  # Ctrl-C reaches this process only
        )
        if cpus:
            with suppress(OSError):
                os.sched_setaffinity(self.process.pid, cpus)
        assert self.process.stdout is not None
        self.answers = self.process.stdout

    def send(self, shard: str) -> None:
        assert self.process.stdin is not None
        request = {"run": str(self._run), "shard": shard, "progress": self._progress}
        line = json.dumps(request) + "\n"
        with suppress(BrokenPipeError):  # the worker has died: `read` returns None
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()

    def read(self) -> dict[str, Any] | None:
        """The next answer; None if there will be none."""
        line = self.answers.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def restart(self) -> str | None:
        """Start anew; return the shard that was lost."""
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        self.stop()
        self._failed_starts = 0 if self.ready else self._failed_starts + 1
        # A random kill may hit a start, too; a worker that exits by itself would do so again.
        if self._failed_starts and (code is None or code >= 0 or self._failed_starts > _STARTS):
            self._messages.seek(0)
            said = self._messages.read().decode(errors="replace").strip()
            raise WorkerError(
                f"a worker could not be started (exit code {code}); it said:\n{said[-2000:]}"
            )
        shard, self.shard, self.ready = self.shard, None, False
        self._start()
        return shard

    def stop(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)  # files appear by renaming, never half-written
        self.process.wait()

    def close(self) -> None:
        self.stop()
        self._messages.close()


@contextmanager
def _team(
    run: Path, places: Sequence[dict[str, Any]], threads: int, progress: bool
) -> Iterator[list[_Worker]]:
    team: list[_Worker] = []
    try:
        for place in places:
            team.append(_Worker(run, place, threads, progress))
        yield team
    finally:
        for worker in team:
            worker.close()


def _places(workers: int | None, threads: int) -> list[dict[str, Any]]:
    """Cores and GPUs for each worker."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        if workers is not None and workers > gpus:
            raise ArgumentError(f"workers={workers}, but there are {gpus} GPUs: one per worker")
        return [
            {"cpus": None, "env": {"CUDA_VISIBLE_DEVICES": _visible(k)}}
            for k in range(workers or gpus)
        ]
    cpus = sorted(os.sched_getaffinity(0))
    count = workers or max(1, len(cpus) // threads)
    enough = count * threads <= len(cpus)
    return [
        {"cpus": set(cpus[k * threads : (k + 1) * threads]) if enough else None, "env": {}}
        for k in range(count)
    ]


def _visible(index: int) -> str:
    """The GPU's name in the CUDA_VISIBLE_DEVICES of this process, or its index."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[index] if named else str(index)
