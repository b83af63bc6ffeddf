"""Two processes of a gloo group that share one import of everything."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

SCRIPT = """
import os, sys
sys.path[:0] = {paths!r}
from two_processes import join
from {module} import work
other = os.fork()  # after the imports, which take longest
join(work, int(other == 0), sys.argv[1])
sys.exit(other and os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


def join(work: Callable[[int, Path], Any], rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    options: dict[str, Any] = {"init_method": f"file://{folder}/meet", "world_size": 2}
    distributed.init_process_group("gloo", rank=rank, **options)
    torch.save(work(rank, Path(folder)), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def results(module: str, folder: Path) -> list[Any]:
    """What the module's `work(rank, folder)` returns in each of the two processes."""
    script = SCRIPT.format(paths=sys.path, module=module)
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # no pool of threads to lose in the fork
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder)]
    worker = subprocess.Popen(command, env=one_thread, start_new_session=True)
    try:
        assert worker.wait(timeout=300) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
