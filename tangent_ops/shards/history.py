"""A shard's history: how its training went, in a file beside its result.

A history is a trace of the shard's images, so it is erased where the result is. A private fit has
none: its losses are not private.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tangent_ops.errors import PlanError
from tangent_ops.files import erase, opened, to_json, write_atomically
from tangent_ops.shards.plan import Plan

_LARGEST = 1 << 24  # bytes of a file; a history of 100,000 epochs has 6 million


@dataclass(frozen=True)
class ShardHistory:
    """How a shard's training went.

    Attributes:
        loss: of each epoch, the mean of the objective; empty for a method without epochs.
        lr: of each epoch, the learning rate of its first step.
        accuracy: on the run's validation images, after each epoch, or once after a fit without
            epochs; empty if the run has no such images, or they could not be read.
        seconds: wall time.
        bound: of an exact fit, a bound on the distance of the delta from the optimum.
    """

    loss: tuple[float, ...] = ()
    lr: tuple[float, ...] = ()
    accuracy: tuple[float, ...] = ()
    seconds: float = 0.0
    bound: float | None = None


def history_path(plan: Plan, job: str) -> Path:
    """The file of a job's history."""
    return plan.result_path(job).with_suffix(".json")


def write_history(plan: Plan, job: str, history: ShardHistory) -> None:
    """Write a job's history, atomically, before its result: a result is never without one."""
    record = asdict(history) | {"anchor": plan.anchor_info.fingerprint, "job": job}
    path = history_path(plan, job)

    def write(file: BinaryIO) -> None:
        file.write(to_json(record).encode())

    erase(path)  # of a worker that was killed before it wrote the result
    write_atomically(path, write)


def read_history(plan: Plan, job: str) -> ShardHistory | None:
    """A job's history; None if it has none.

    Raises:
        PlanError: the file is damaged, a link, or another job's.
    """
    path = history_path(plan, job)
    try:
        record = read_record(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error}") from error
    origin = (record.pop("anchor", None), record.pop("job", None))
    if origin != (plan.anchor_info.fingerprint, job):
        raise PlanError(f"{path} is the history of another job: remove it")
    try:
        return _history(**record)
    except (ValueError, TypeError) as error:
        raise PlanError(f"{path} is damaged: {error}. Remove it") from error


def read_record(path: Path) -> dict[str, Any]:
    """The values in a history's file, unchecked.

    Raises:
        OSError: there is no such file, or it is no regular one.
        PlanError: it is too large, or holds something else.
    """
    with opened(path, own=True) as name, open(name, "rb") as file:
        text = file.read(_LARGEST + 1)
    try:
        record = json.loads(text if len(text) <= _LARGEST else b"")
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise PlanError(f"{path} is damaged, or no history: remove it")
    return record


def _history(*, loss: Any, lr: Any, accuracy: Any, seconds: Any, bound: Any) -> ShardHistory:
    if len(loss) != len(lr) or (loss and accuracy and len(accuracy) != len(loss)):
        raise ValueError("its columns have different lengths")
    listed = [*loss, *lr, *accuracy, seconds, *([] if bound is None else [bound])]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in listed):
        raise ValueError("a value is no number")
    return ShardHistory(tuple(loss), tuple(lr), tuple(accuracy), seconds, bound)
