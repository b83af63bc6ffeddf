"""A worker of `tangent_ops.shards.local`: it forks one process per shard.

It imports PyTorch and timm once, but computes nothing itself, so that each fork starts fast and in
a clean state. Requests and answers are lines of JSON. When the input ends, the fork is killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from typing import Any

import timm.data  # noqa: F401 - once here, not in every fork

from tangent_ops.shards.job import attempt


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is printed must not mix with the answers
    print(json.dumps({"ready": True}), file=answers)
    requests = os.fdopen(0, "rb", buffering=0, closefd=False)
    while line := requests.readline():
        request = json.loads(line)
        print(json.dumps(_forked(**request)), file=answers)


def _forked(run: str, shard: str, progress: bool) -> dict[str, Any]:
    """What `attempt` returns in a process of its own; or the signal that killed it."""
    output, input = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(output)
            with open(os.devnull, "rb") as nothing:
                os.dup2(nothing.fileno(), 0)
            with os.fdopen(input, "w") as file:
                json.dump(attempt(run, shard, progress), file)
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.close(input)
    answer = b""
    with os.fdopen(output, "rb", buffering=0) as file:
        while True:
            ready, _, _ = select.select([0, file], [], [])
            if file in ready:
                some = file.read(65536)
                if not some:
                    break
                answer += some
            else:  # the input ended: the parent process is gone
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                sys.exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return json.loads(answer)
    return {"died": f"signal {-status}" if status < 0 else f"exit code {status}"}


if __name__ == "__main__":
    serve()
