"""Train one shard: from sample ids, recipe and anchor to the file of a delta or of statistics."""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.delta import Delta, save_delta
from tangent_ops.errors import TangentOpsError, in_words
from tangent_ops.exact import Problem, fit_exact
from tangent_ops.exact.collect import statistics
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.shards.data import Samples
from tangent_ops.shards.history import ShardHistory, write_history
from tangent_ops.shards.plan import Job, Plan
from tangent_ops.shards.recipe import ShardRecipe
from tangent_ops.shards.results import write_statistics
from tangent_ops.shards.shared_model import SharedModel
from tangent_ops.training.fit import fit

# Libraries read these when a process starts. The last bits of a sum depend on how it is split.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def attempt(
    run: str, shard: str, progress: bool = False, shared: SharedModel | None = None
) -> dict[str, Any]:
    """Train a shard in this process, unless its delta, or its statistics, exist.

    Args:
        run: the folder of a plan.
        shard: the shard's name.
        progress: show bars.
        shared: of the shards that this process trains one after the other; None for this one only.

    Returns:
        Plain values: "seconds"; "loss", "lr" and, if the run has validation images, "accuracy" by
        epoch, as in `ShardHistory`, if the fit is not private; "unmeasured", why there is no
        accuracy, if these images cannot be read. Or "error", a message, if trying again would not
        help.
    """
    began = time.perf_counter()
    try:
        plan = Plan.open(run)
        job = plan.job(shard)
        # A killed worker may have written its result; a private fit must not be published twice.
        found = {} if plan.result_path(job.hash).exists() else _train(plan, job, progress, shared)
    except (TangentOpsError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        return {"error": _told(error)}
    except Exception:
        return {"error": traceback.format_exc()}
    return {**found, "seconds": time.perf_counter() - began}


def _train(plan: Plan, job: Job, progress: bool, shared: SharedModel | None) -> dict[str, Any]:
    recipe, began = plan.recipe, time.perf_counter()
    # A private fit shares nothing with others.
    shared = shared if shared is not None and recipe.dp_epsilon is None else SharedModel()
    torch.set_num_threads(recipe.threads)
    data = job_data(plan, job)
    if recipe.method == "statistics":
        found = statistics_of(plan, data, progress, shared)
        write_history(plan, job.hash, ShardHistory(seconds=time.perf_counter() - began))
        write_statistics(plan, job, found)
        return {}
    tangent = shared.start(plan, device())
    privacy = recipe.privacy(len(data))
    if privacy is not None:
        from tangent_ops.privacy import fit_private

        delta = fit_private(
            tangent,
            data,
            privacy,
            loss=recipe.loss,
            lr=recipe.lr,
            optimizer=recipe.optimizer,
            l2=recipe.l2,
            schedule=recipe.schedule,
            cache=recipe.cached,
            progress=progress,
        ).delta
        save(plan, job, delta)
        return {}
    bound = None
    validator = shared.validator(plan, tangent)
    if recipe.method == "exact":
        bound = fit_exact(job_problem(tangent, data, recipe, progress), recipe.tol).distance_bound
        validator.measure()
        losses = rates = ()
    else:
        history = fit(
            tangent,
            data,
            recipe,
            cache=recipe.cached,
            progress=progress,
            on_epoch=lambda _: validator.measure(),
        )
        losses, rates = tuple(history.loss), tuple(history.lr)
    found = ShardHistory(
        losses, rates, tuple(validator.accuracy), time.perf_counter() - began, bound
    )
    write_history(plan, job.hash, found)
    save(plan, job, tangent.delta_dict())
    told = {} if validator.failure is None else {"unmeasured": validator.failure}
    return {**{k: v for k, v in asdict(found).items() if v and k != "seconds"}, **told}


def statistics_of(
    plan: Plan, data: Samples, progress: bool, shared: SharedModel
) -> TangentStatistics:
    """The statistics of some of a plan's samples, which are read one after the other."""
    tangent, classes = shared.start(plan, device()), plan.anchor_info.classes
    return statistics(tangent, data, classes=classes or None, progress=progress)


def device() -> str:
    """Where shards are trained."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def job_problem(
    tangent: LinearizedModel, data: Samples, recipe: ShardRecipe, progress: bool
) -> Problem:
    """What a job with the method "exact" solves."""
    return Problem(
        tangent,
        data,
        recipe.l2,
        loss=recipe.loss_function,
        batch_size=recipe.batch_size,
        cache=recipe.cached,
        progress=progress,
    )


def job_data(plan: Plan, job: Job) -> Samples:
    """A job's samples, preprocessed for the anchor."""
    return plan.data.pick(
        [sample.id for sample in job.samples],
        [sample.target for sample in job.samples],
        [sample.content for sample in job.samples],
        plan.anchor_info.input,
        augment=plan.recipe.augment,
    )


def save(plan: Plan, job: Job, delta: Delta, **extra: str) -> Path:
    """Write a job's delta to its file, atomically."""
    assert delta.meta is not None
    extra = {
        **delta.meta.extra,
        "job": job.hash,
        "samples": str(len(job.samples)),
        "torch": torch.__version__,
        **extra,
    }
    path = plan.result_path(job.hash)
    meta = replace(delta.meta, shard=job.shard, loss=plan.recipe.loss, extra=extra)
    save_delta(delta, path, meta=meta)
    return path


def _told(error: BaseException) -> str:
    if isinstance(error, (TangentOpsError, OSError)):
        return in_words(error)
    return f"{type(error).__name__}: {error}. A smaller batch_size, or grad_checkpointing, may fit"


def environment(threads: int) -> dict[str, str]:
    """The environment variables of a worker's process."""
    return {**os.environ, **dict.fromkeys(THREADS, str(threads))}
