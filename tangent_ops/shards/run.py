"""`run_shards`: train the shards of a plan that have no delta yet, here or on a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from tangent_ops.checks import check_choice, check_integer
from tangent_ops.errors import ArgumentError, PlanError
from tangent_ops.files import sweep
from tangent_ops.shards.local import run_local
from tangent_ops.shards.on_ray import need_ray, run_on_ray
from tangent_ops.shards.plan import Plan
from tangent_ops.shards.summary import write_summary

EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class Report:
    """The result of `run_shards`.

    Attributes:
        trained: shards that were trained now.
        skipped: shards whose deltas existed already.
        empty: shards without samples, which have no delta.
        failed: shard -> error message. The other shards are trained nevertheless.
        seconds: wall time.
    """

    trained: tuple[str, ...]
    skipped: tuple[str, ...]
    empty: tuple[str, ...]
    failed: dict[str, str]
    seconds: float


def run_shards(
    plan: Plan,
    executor: str = "local",
    *,
    workers: int | None = None,
    retries: int = 3,
    address: str | None = None,
    progress: bool = True,
    on_done: Callable[[str, dict[str, Any]], None] | None = None,
) -> Report:
    """Train every shard of a plan that has no delta yet.

    On a CPU a delta is the same bit for bit for every executor and number of workers, however many
    workers were killed, except that of a private fit, whose noise must not repeat. Deltas appear by
    renaming complete files. After an interruption the same call trains what is left.

    Args:
        plan: what to train.
        executor: "local", processes on this machine, each with cores or a GPU of its own; small
            shards share one (`tangent_ops.shards.worker`). Or "ray", a task for each shard, which
            needs the extra ``distributed``.
        workers: number of shards at a time; None for one per GPU, or else as the cores permit.
        retries: how often a shard is tried again after its process died.
        address: of a Ray cluster, whose machines see the run and the images under the same paths.
        progress: show a bar of shards; or, if one shard is trained on this machine, its own bar.
        on_done: called as each shard ends, with its name and
            ``{"seconds": ..., "loss": [...], "lr": [...], "accuracy": [...]}`` (by epoch, where
            there are epochs and, for the accuracy, validation images), or ``{"error": message}``.

    Raises:
        ArgumentError: an argument is not as above.
        UnsupportedError: Ray is not installed.
        PlanError: the plan is damaged, or another process is at work on it.
        WorkerError: no worker can be started.
        KeyboardInterrupt: the workers are stopped first; finished deltas stay.
    """
    with plan.locked():
        return train(
            plan,
            None,
            executor,
            workers=workers,
            retries=retries,
            address=address,
            progress=progress,
            on_done=on_done,
        )


def check_executor(
    executor: str, workers: int | None, retries: int = 3, address: str | None = None
) -> None:
    """Raise the errors of `run_shards` about these arguments."""
    check_choice("executor", executor, EXECUTORS)
    if workers is not None:
        check_integer("workers", workers, 1)
    check_integer("retries", retries, 0)
    if address is not None and executor != "ray":
        raise ArgumentError("address is for executor='ray': pass that, too")
    if executor == "ray":
        need_ray()


def train(
    plan: Plan,
    only: Collection[str] | None,
    executor: str,
    *,
    workers: int | None,
    retries: int = 3,
    address: str | None = None,
    progress: bool,
    on_done: Callable[[str, dict[str, Any]], None] | None = None,
) -> Report:
    """`run_shards` for a caller that has locked the plan; ``only`` limits it to some shards."""
    began = time.perf_counter()
    check_executor(executor, workers, retries, address)
    sweep(plan.results_path)

    shards = [s for s in plan.shards() if only is None or s.name in only]
    todo = [shard.name for shard in shards if shard.job is not None and not shard.done]
    trained: list[str] = []
    failed: dict[str, str] = {}
    alone = progress and executor == "local" and len(todo) == 1
    with tqdm(
        total=len(todo), desc="shards", unit="shard", disable=alone or not progress or not todo
    ) as bar:

        def on_result(shard: str, result: dict[str, Any]) -> None:
            if "error" in result:
                failed[shard] = result["error"]
            else:
                trained.append(shard)
            bar.update()
            if on_done is not None:
                on_done(shard, result)

        options = {"workers": workers, "threads": plan.recipe.threads, "retries": retries}
        if todo and executor == "ray":
            run_on_ray(plan.path, todo, **options, address=address, on_result=on_result)
        elif todo:
            run_local(plan.path, todo, **options, progress=alone, on_result=on_result)
    with suppress(OSError, PlanError):  # a full disk, say: the shards' results stand without it
        write_summary(plan)
    return Report(
        trained=tuple(trained),
        skipped=tuple(shard.name for shard in shards if shard.done),
        empty=tuple(shard.name for shard in shards if shard.job is None),
        failed=failed,
        seconds=time.perf_counter() - began,
    )
