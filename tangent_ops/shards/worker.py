"""A worker of `tangent_ops.shards.local`: it forks processes that train shards.

It imports PyTorch and timm once, but computes nothing itself, so that each fork starts fast and in
a clean state. A fork trains shards one after the other, with one model, until it has been at work
for `SHARING` seconds or a shard fails; so many small shards share a start, and a large one begins
or ends a fork. A private fit has a fork of its own. A shard's bits do not depend on the others.

Requests and answers are lines of JSON. When the input ends, the fork is killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import warnings
from contextlib import suppress
from typing import Any, BinaryIO

import timm.data  # noqa: F401 - once here, not in every fork

from tangent_ops.shards.job import attempt
from tangent_ops.shards.shared_model import SharedModel

SHARING = 60.0  # seconds, beside which those of a start, 1 to 2, are few


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is printed must not mix with the answers
    with warnings.catch_warnings(), suppress(ImportError):
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about torch.jit
        import torch._decomp.decompositions_for_jvp  # noqa: F401 - or the first dual tensor does
    print(json.dumps({"ready": True}), file=answers)
    requests = os.fdopen(0, "rb", buffering=0, closefd=False)
    fork: _Fork | None = None
    while line := requests.readline():
        if fork is None or fork.ended():
            _import_privacy(json.loads(line)["run"])
            fork = _Fork(answers.fileno())
        print(json.dumps(fork.train(line)), file=answers)
        fork = fork if fork.goes_on else None


def _import_privacy(run: str) -> None:
    """Import what the fits of a private run need, once here."""
    with suppress(Exception):  # the fork says what is wrong with the run
        from tangent_ops.shards.plan import Plan

        if Plan.open(run).recipe.dp_epsilon is not None:
            import tangent_ops.privacy.fit  # noqa: F401


class _Fork:
    """A forked process, which trains one shard at a time.

    Attributes:
        goes_on: whether it waits for another shard.
    """

    def __init__(self, answers: int) -> None:
        shards, self._shards = os.pipe()
        self._results, results = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                for ours in (answers, self._shards, self._results):
                    os.close(ours)  # so that whoever reads these pipes sees their end
                with open(os.devnull, "rb") as nothing:
                    os.dup2(nothing.fileno(), 0)
                with os.fdopen(shards, "rb") as asked, os.fdopen(results, "wb") as told:
                    _train_in_turn(asked, told)
            except BaseException:
                os._exit(1)
            os._exit(0)
        os.close(shards)
        os.close(results)
        self.goes_on = True

    def ended(self) -> bool:
        """Whether the process has ended, killed while it waited."""
        if os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            return False
        self._close()
        return True

    def train(self, request: bytes) -> dict[str, Any]:
        """What `attempt` returns in the process; or the signal that killed it."""
        with suppress(BrokenPipeError):  # killed just now: there will be no answer
            os.write(self._shards, request)
        answer = b""
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([0, self._results], [], [])
            if self._results not in ready:  # the input ended: the parent process is gone
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                sys.exit(1)
            some = os.read(self._results, 65536)
            if not some:
                break
            answer += some
        told: dict[str, Any] = json.loads(answer) if answer.endswith(b"\n") else {}
        self.goes_on = told.get("goes_on", False)
        if self.goes_on:
            return told["result"]
        self._close()
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        died = {"died": f"signal {-status}" if status < 0 else f"exit code {status}"}
        return told.get("result", died)

    def _close(self) -> None:
        os.close(self._shards)
        os.close(self._results)


def _train_in_turn(asked: BinaryIO, told: BinaryIO) -> None:
    """Train shards until there are no more, or another process should go on."""
    shared, began, goes_on = SharedModel(), time.monotonic(), True
    while goes_on and (line := asked.readline()):
        request = json.loads(line)
        result = attempt(request["run"], request["shard"], request["progress"], shared)
        done = "error" not in result
        goes_on = done and shared.made and time.monotonic() - began < SHARING
        told.write(json.dumps({"result": result, "goes_on": goes_on}).encode() + b"\n")
        told.flush()


if __name__ == "__main__":
    serve()
