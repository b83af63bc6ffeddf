"""Shows the progress of ``finetune``: a bar, and files for TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tangent_ops.cli.messages import fail

Event = Callable[[str, dict[str, Any]], None]


@contextmanager
def watching(total: int, folder: Path | None, quiet: bool) -> Iterator[Event]:
    """A function to call as each shard ends.

    Args:
        total: number of shards to train.
        folder: for TensorBoard's files; None for no files.
        quiet: no bar.
    """
    writer = _writer(folder)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(
            *columns, console=Console(stderr=True), disable=quiet or not total
        ) as progress:
            task = progress.add_task("shards", total=total)

            def event(shard: str, found: dict[str, Any]) -> None:
                progress.update(task, advance=1)
                if writer is not None:
                    for name in ("loss", "lr"):
                        for epoch, value in enumerate(found.get(name, ())):
                            writer.add_scalar(f"{name}/{shard}", value, epoch)

            yield event
    finally:
        if writer is not None:
            writer.close()


def check_tensorboard(folder: Path | None) -> None:
    """Exit with an install command if a folder is given and TensorBoard is missing."""
    if folder is not None and importlib.util.find_spec("tensorboard") is None:
        fail('--tensorboard needs tensorboard: pip install "tangent-ops[tensorboard]"', code=2)
    if folder is not None and folder.exists() and not folder.is_dir():
        fail(f"--tensorboard {folder}: it is a file: give a folder", code=2)


def _writer(folder: Path | None) -> Any:
    if folder is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
