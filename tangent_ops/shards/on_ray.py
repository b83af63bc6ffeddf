"""The Ray executor: one task per shard, on this machine or on a cluster."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.shards.job import THREADS, attempt
from tangent_ops.shards.local import Result, died


def run_on_ray(
    run: Path,
    shards: Sequence[str],
    *,
    workers: int | None,
    threads: int,
    retries: int,
    address: str | None,
    on_result: Result,
) -> None:
    """Train shards as Ray tasks, each with `threads` cores, and a GPU where the cluster has some.

    Args:
        run: a folder; all machines of the cluster see it, and the images, under the same paths.
        shards: their names.
        workers: the largest number of tasks at a time; None for as many as the resources permit.
        threads: cores of a task.
        retries: how often a task whose process or machine died is tried again.
        address: of a cluster; None uses the Ray that is running in this process, or the cluster
            that RAY_ADDRESS names, or starts one on this machine.
        on_result: called with each shard's name and what `attempt` returned, or an error.

    Raises:
        UnsupportedError: Ray is not installed.
        ArgumentError: there is no cluster at this address, or it has fewer cores than a
            task needs.
    """
    ray = need_ray()
    # Ray reports dead workers on stdout, which is for results.
    with redirect_stdout(sys.stderr), _connected(ray, address, workers, threads):
        resources = ray.cluster_resources()
        if resources.get("CPU", 0) < threads:
            raise ArgumentError(
                f"threads={threads}, but Ray has {resources.get('CPU', 0):g} cores: pass fewer"
            )
        task = ray.remote(
            num_cpus=threads,
            num_gpus=1 if resources.get("GPU", 0) else 0,
            max_retries=retries,
        )(attempt)
        waiting, running = deque(shards), {}
        try:
            while waiting or running:
                while waiting and (workers is None or len(running) < workers):
                    shard = waiting.popleft()
                    running[task.remote(str(run), shard)] = shard
                finished, _ = ray.wait(list(running))
                for reference in finished:
                    on_result(running.pop(reference), _result(ray, reference, retries))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def need_ray() -> Any:
    """Import and return the package `ray`.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(
            'executor "ray" needs Ray: pip install "tangent-ops[distributed]"; or use "local"'
        ) from error
    return ray


@contextmanager
def _connected(ray: Any, address: str | None, workers: int | None, threads: int) -> Iterator[None]:
    if ray.is_initialized():
        if address is not None:
            raise ArgumentError("Ray is running in this process already: leave address out")
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment = {name: str(threads) for name in THREADS}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {"num_cpus": workers * threads if workers else None, "include_dashboard": False}
        options["runtime_env"] = {"env_vars": environment}
    try:
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises several kinds
        where = f"the cluster at {address}" if address else "Ray on this machine"
        raise ArgumentError(f"{where} cannot be reached or started: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _result(ray: Any, reference: Any, retries: int) -> dict[str, Any]:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        return {"error": died(f"Ray says {type(error).__name__}", retries + 1)}
