"""Shows the progress of ``finetune``: a bar or lines, and values for TensorBoard and wandb."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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

from tangent_ops.cli.messages import fail, tell

Event = Callable[[str, dict[str, Any]], None]

_EVERY = 10.0  # seconds between lines, at most
_FEW = 20  # so many shards have a line each
_SCALARS = ("loss", "lr", "accuracy")


@contextmanager
def watching(
    total: int, quiet: bool, tensorboard: Path | None = None, wandb: str | None = None
) -> Iterator[Event]:
    """A function to call as each shard ends.

    Args:
        total: number of shards to train.
        quiet: show no progress.
        tensorboard: folder for TensorBoard's files; None for no files.
        wandb: project for values by epoch; None for none.
    """
    with ExitStack() as stack:
        events = [stack.enter_context(_tensorboard(tensorboard))] if tensorboard else []
        events += [stack.enter_context(_wandb(wandb))] if wandb else []
        if total and not quiet:
            shown = _bar if sys.stderr.isatty() else _lines
            events.append(stack.enter_context(shown(total)))

        def event(shard: str, found: dict[str, Any]) -> None:
            for one in events:
                one(shard, found)

        yield event


def check_trackers(tensorboard: Path | None, wandb: str | None) -> None:
    """Exit with an install command if one is asked for and its package is missing."""
    if tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
        fail('--tensorboard needs tensorboard: pip install "tangent-ops[tensorboard]"', code=2)
    if tensorboard is not None and tensorboard.exists() and not tensorboard.is_dir():
        fail(f"--tensorboard {tensorboard}: it is a file: give a folder", code=2)
    if wandb is not None and importlib.util.find_spec("wandb") is None:
        fail("--wandb needs wandb: pip install wandb", code=2)


@contextmanager
def _bar(total: int) -> Iterator[Event]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("shards", total=total)
        yield lambda _shard, _found: progress.update(task, advance=1)


@contextmanager
def _lines(total: int) -> Iterator[Event]:
    """Lines for a log: one for each of a few shards, of many one in ten seconds."""
    began = last = time.monotonic()
    done = 0
    ended = threading.Event()
    lock = threading.Lock()

    def line(text: str) -> None:
        nonlocal last
        last = time.monotonic()
        tell(f"shards: {done} of {total} done after {last - began:.0f} s{text}")

    def event(shard: str, found: dict[str, Any]) -> None:
        nonlocal done
        with lock:
            done += 1
            if total <= _FEW or done == total or time.monotonic() - last >= _EVERY:
                line(f"; {shard}: {_said(found)}")

    def wait() -> None:
        while not ended.wait(_EVERY):
            with lock:
                if time.monotonic() - last >= _EVERY:
                    line("")

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    try:
        yield event
    finally:
        ended.set()
        waiting.join()


def _said(found: dict[str, Any]) -> str:
    if "error" in found:
        return "failed"
    words = [f"{found['seconds']:.1f} s"]
    if loss := found.get("loss"):
        words.append(f"loss {loss[0]:.3g} to {loss[-1]:.3g}")
    if accuracy := found.get("accuracy"):
        words.append(f"accuracy {accuracy[-1]:.1%}")
    return ", ".join(words)


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Event]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def event(shard: str, found: dict[str, Any]) -> None:
        for name in _SCALARS:
            for epoch, value in enumerate(found.get(name, ())):
                writer.add_scalar(f"{name}/{shard}", value, epoch)

    try:
        yield event
    finally:
        writer.close()


@contextmanager
def _wandb(project: str) -> Iterator[Event]:
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(project=project)
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch")

    def event(shard: str, found: dict[str, Any]) -> None:
        epochs = max((len(found.get(name, ())) for name in _SCALARS), default=0)
        for epoch in range(epochs):
            values = {n: found[n][epoch] for n in _SCALARS if epoch < len(found.get(n, ()))}
            run.log({f"{n}/{shard}": value for n, value in values.items()} | {"epoch": epoch})

    try:
        yield event
    finally:
        run.finish()
