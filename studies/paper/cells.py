"""Cells: the study's smallest pieces, run in processes, each kept in a file as soon as it is done.

A cell is a function's name and its arguments. Its file says which sources computed it: after a
change of any of them it is computed again; after an interruption it is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
# What the numbers come from; what writes them down (studies/paper/report) is not among it.
SOURCES = ("tangent_ops", "kernels", "examples", "studies/paper")
WRITTEN_BY = ROOT / "studies" / "paper" / "report"


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    Attributes:
        part: The part of the study, in `studies.paper.parts.PARTS`.
        arguments: Of the part's `run`; JSON.
    """

    part: str
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        """A file name that says what it is."""
        values = "-".join(_text(value) for value in self.arguments.values())
        digest = hashlib.sha256(json.dumps(self.arguments, sort_keys=True).encode()).hexdigest()
        return f"{self.part}-{values[:120]}-{digest[:8]}"


@dataclass
class Found:
    """Results of the cells that are done: by part, arguments and what came out."""

    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, part: str, **given: Any) -> list[dict[str, Any]]:
        """Arguments and results in one dict, of the cells of a part with these arguments."""
        merged = (
            {**cell["arguments"], **cell["result"], "cell_seconds": cell["seconds"]}
            for cell in self.cells.values()
            if cell["part"] == part
        )
        return [
            cell for cell in merged if all(cell.get(name) == value for name, value in given.items())
        ]


def sources_sha256() -> str:
    """Of all Python files that a number may depend on, hex."""
    digest = hashlib.sha256()
    files = (file for source in SOURCES for file in (ROOT / source).rglob("*.py"))
    for file in sorted(files):
        if WRITTEN_BY not in file.parents:
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def kept(folder: Path) -> int:
    """How many cells of these sources are in the folder."""
    return len(_read(folder, sources_sha256())) if folder.is_dir() else 0


def run_all(
    plan: Callable[[Found], Iterable[Cell]],
    run: Callable[[Cell], dict[str, Any]],
    folder: Path,
    *,
    workers: int,
    threads: int,
) -> Found:
    """Run all cells that the plan comes to, those found in the folder excepted.

    Args:
        plan: What is to be run, given what was found; asked again until nothing new comes.
        run: Runs one cell, in a process of its own; importable.
        folder: Holds a file to each cell.
        workers: Processes.
        threads: Of torch, in each.

    Raises:
        RuntimeError: Cells failed; the others are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = sources_sha256()
    found = Found(_read(folder, sources))
    failed: dict[str, str] = {}
    context = get_context("spawn")  # forked processes hang in torch's threads
    with (
        ProcessPoolExecutor(workers, context, _prepare, (threads,)) as pool,
        tqdm(desc="study", unit="cell", smoothing=0) as bar,
    ):
        running: dict[Future[dict[str, Any]], Cell] = {}
        while True:
            planned = {cell.name: cell for cell in plan(found)}
            known = found.cells.keys() | failed.keys() | {cell.name for cell in running.values()}
            for name, cell in planned.items():
                if name not in known:
                    running[pool.submit(_timed, run, cell)] = cell
            if not running:
                break
            bar.total = len(planned)
            bar.n = sum(name in found.cells for name in planned)
            bar.refresh()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    outcome = future.result()
                except Exception as error:  # of any kind: the others go on
                    failed[cell.name] = f"{type(error).__name__}: {error}"
                    tqdm.write(f"failed: {cell.name}: {failed[cell.name]}")
                    continue
                record = {"part": cell.part, "arguments": dict(cell.arguments), **outcome}
                found.cells[cell.name] = record
                _write(folder / f"{cell.name}.json", {**record, "sources": sources})
                bar.set_postfix_str(cell.name[:60], refresh=False)
    if failed:
        listed = "\n".join(f"  {name}: {why}" for name, why in failed.items())
        raise RuntimeError(
            f"cells that failed: {len(failed)}; the others are kept in {folder}, and the same "
            f"command goes on with what is missing:\n{listed}"
        )
    wanted = {cell.name for cell in plan(found)}
    return Found({name: cell for name, cell in found.cells.items() if name in wanted})


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    # Cross-entropy's gradients of samples that are right underflow, and subnormals are slow: 4x.
    torch.set_flush_denormal(True)


def _timed(run: Callable[[Cell], dict[str, Any]], cell: Cell) -> dict[str, Any]:
    began = time.perf_counter()
    result = run(cell)
    return {"result": result, "seconds": time.perf_counter() - began}


def _read(folder: Path, sources: str) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("sources") == sources:
            found[path.stem] = record
    return found


def _write(path: Path, record: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "+".join(map(_text, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in text)
