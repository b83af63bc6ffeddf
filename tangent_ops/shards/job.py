"""Train one shard: data ids, recipe and anchor in, a delta's file out."""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tangent_ops.delta import Delta, save_delta
from tangent_ops.errors import TangentOpsError
from tangent_ops.exact import fit_exact
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.shards.data import Samples
from tangent_ops.shards.plan import Job, Plan
from tangent_ops.shards.recipe import LOSSES, Recipe
from tangent_ops.training.fit import fit

# Libraries read it when a process starts; bits of a sum depend on how it was split.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def attempt(run: str, shard: str, progress: bool = False) -> dict[str, Any]:
    """Train a shard whose delta is not there yet, in this process.

    Args:
        run: the folder of a plan.
        shard: the shard's name.
        progress: show bars.

    Returns:
        Plain values: seconds, and loss and lr by epoch, if the fit has epochs and is not private;
        or error, a message, if trying again would not help.
    """
    began = time.perf_counter()
    try:
        plan = Plan.open(run)
        job = plan.job(shard)
        # It may have been killed after its end; a private fit must not be published twice.
        found = {} if plan.delta_path(job.hash).exists() else _train(plan, job, progress)
    except (TangentOpsError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        return {"error": _described(error)}
    except Exception:
        return {"error": traceback.format_exc()}
    return {**found, "seconds": time.perf_counter() - began}


def _train(plan: Plan, job: Job, progress: bool) -> dict[str, Any]:
    recipe = plan.recipe
    torch.set_num_threads(recipe.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tangent = plan.tangent().to(device)
    data = job_data(plan, job)
    found: dict[str, Any] = {}
    if recipe.dp_epsilon is not None:
        delta = _private(tangent, data, recipe, progress)
    else:
        if recipe.method == "exact":
            fit_exact(
                tangent,
                data,
                recipe.l2,
                recipe.tol,
                loss=LOSSES[recipe.loss](),
                batch_size=recipe.batch_size,
                cache=recipe.cached,
                progress=progress,
            )
        else:
            history = fit(
                tangent,
                data,
                loss=LOSSES[recipe.loss](),
                epochs=recipe.epochs,
                lr=recipe.lr,
                batch_size=recipe.batch_size,
                optimizer=recipe.optimizer,
                l2=recipe.l2,
                schedule=recipe.schedule,
                seed=recipe.seed,
                amp=recipe.amp,
                cache=recipe.cached,
                accumulate=recipe.accumulate,
                progress=progress,
            )
            found = {"loss": history.loss, "lr": history.lr}
        delta = tangent.delta_dict()
    save(plan, job, delta)
    return found


def job_data(plan: Plan, job: Job) -> Samples:
    """A job's samples, prepared as the anchor takes them."""
    return plan.data.pick(
        [sample.id for sample in job.samples],
        [sample.target for sample in job.samples],
        [sample.content for sample in job.samples],
        plan.anchor_info.input,
        augment=plan.recipe.augment,
    )


def save(plan: Plan, job: Job, delta: Delta, **extra: str) -> Path:
    """Let a job's delta appear in its place."""
    assert delta.meta is not None
    extra = {
        **delta.meta.extra,
        "job": job.hash,
        "samples": str(len(job.samples)),
        "torch": torch.__version__,
        **extra,
    }
    path = plan.delta_path(job.hash)
    meta = replace(delta.meta, shard=job.shard, loss=plan.recipe.loss, extra=extra)
    save_delta(delta, path, meta=meta)
    return path


def _private(tangent: LinearizedModel, data: Samples, recipe: Recipe, progress: bool) -> Delta:
    from tangent_ops.privacy import fit_private

    assert recipe.dp_delta is not None
    return fit_private(
        tangent,
        data,
        delta=recipe.dp_delta,
        max_grad_norm=recipe.dp_clip,
        target_epsilon=recipe.dp_epsilon,
        expected_batch_size=min(recipe.dp_batch_size, len(data)),
        steps=recipe.dp_steps,
        loss=LOSSES[recipe.loss](),
        lr=recipe.lr,
        optimizer=recipe.optimizer,
        l2=recipe.l2,
        schedule=recipe.schedule,
        cache=recipe.cached,
        progress=progress,
    ).delta


def _described(error: BaseException) -> str:
    if isinstance(error, (TangentOpsError, OSError)):
        return str(error)
    return f"{type(error).__name__}: {error}. A smaller batch_size, or grad_checkpointing, may fit"


def environment(threads: int) -> dict[str, str]:
    """For the process of a worker."""
    return {**os.environ, **dict.fromkeys(THREADS, str(threads))}
