"""``summary.csv``: what the histories of a run say, by epoch, in the format of timm's file.

It holds traces of the shards' images, so it is erased before any history is.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tangent_ops.files import erase, write_atomically
from tangent_ops.shards.history import read_history
from tangent_ops.shards.plan import Plan

COLUMNS = ("epoch", "shard", "train_loss", "eval_top1", "lr")


def summary_path(plan: Plan) -> Path:
    """The file of a run."""
    return plan.path / "summary.csv"


def write_summary(plan: Plan) -> None:
    """Write the file anew, from the histories of the plan's trained shards; none if it is empty.

    A row is an epoch of a shard; eval_top1 is in percent, and empty without validation images. Only
    shards that are trained in epochs have rows.

    Raises:
        PlanError: a history is damaged.
    """
    rows = list(_rows(plan))
    path = summary_path(plan)
    erase(path)
    if not rows:
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(rows)

    def write(file: BinaryIO) -> None:
        file.write(text.getvalue().encode())

    write_atomically(path, write)


def _rows(plan: Plan) -> Iterator[tuple[object, ...]]:
    for shard in plan.shards():
        found = read_history(plan, shard.job) if shard.done and shard.job is not None else None
        if found is None:
            continue
        for epoch, (loss, lr) in enumerate(zip(found.loss, found.lr, strict=True)):
            right = 100 * found.accuracy[epoch] if found.accuracy else ""
            yield epoch, shard.name, loss, right, lr
