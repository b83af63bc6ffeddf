"""Cells: the study's smallest pieces, run in processes, each kept in a file as soon as it is done.

A cell is a part's name and arguments. Its file says which sources computed it: after a change of
any of them it is computed again; after an interruption, or a change of another part, it is not.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
# What every number may depend on, beside the study's modules that a part imports.
SOURCES = ("tangent_ops", "kernels", "examples")
STUDY = "studies.paper."


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
    """Results of the cells that are done: by part, arguments and what came out.

    A result's "choices" are options that were chosen on validation images: name -> what
    `studies.paper.tuning.Choice.told` gives. The page says which ended at an edge of their grid.
    """

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


@functools.cache
def sources_sha256(module: str) -> str:
    """Of all Python files that a number computed by a module of the study may depend on, hex."""
    digest = hashlib.sha256()
    files = {file for source in SOURCES for file in (ROOT / source).rglob("*.py")}
    for file in sorted(files | modules_of(module)):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def modules_of(module: str) -> set[Path]:
    """The files of a module of the study and of those of the study that it imports, and so on."""
    found: set[Path] = set()
    names = [module]
    while names:
        name = names.pop()
        file = (ROOT / name.replace(".", "/")).with_suffix(".py")
        if file in found or not file.is_file():
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(STUDY[:-1]):
                names += [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Import):
                names += [a.name for a in node.names if a.name.startswith(STUDY)]
    return found


def kept(folder: Path, cells: Iterable[Cell], sources: Callable[[Cell], str]) -> Found:
    """Those of the cells that are in the folder, of these sources."""
    found = {}
    for cell in cells:
        path = folder / f"{cell.name}.json"
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.pop("sources") == sources(cell):
                found[cell.name] = record
    return Found(found)


def run_all(
    cells: Sequence[Cell],
    run: Callable[[Cell], dict[str, Any]],
    folder: Path,
    *,
    sources: Callable[[Cell], str],
    workers: int,
    threads: int,
) -> Found:
    """Run all cells, those found in the folder excepted.

    Args:
        cells: Of different names; they start in this order.
        run: Runs one cell, in a process of its own; importable.
        folder: Holds a file to each cell.
        sources: What computes a cell, as a hash.
        workers: Processes.
        threads: Of torch, in each.

    Raises:
        RuntimeError: Cells failed; the others are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = kept(folder, cells, sources)
    failed: dict[str, str] = {}
    context = get_context("spawn")  # forked processes hang in torch's threads
    with (
        ProcessPoolExecutor(workers, context, _prepare, (threads,)) as pool,
        tqdm(total=len(cells), initial=len(found.cells), desc="study", unit="cell") as bar,
    ):
        missing = [cell for cell in cells if cell.name not in found.cells]
        running: dict[Future[dict[str, Any]], Cell] = {
            pool.submit(_timed, run, cell): cell for cell in missing
        }
        for future in as_completed(running):
            cell = running[future]
            bar.set_postfix_str(cell.name[:60], refresh=False)
            bar.update()
            try:
                outcome = future.result()
            except Exception as error:  # of any kind: the others go on
                failed[cell.name] = f"{type(error).__name__}: {error}"
                tqdm.write(f"failed: {cell.name}: {failed[cell.name]}")
                continue
            record = {"part": cell.part, "arguments": dict(cell.arguments), **outcome}
            found.cells[cell.name] = record
            _write(folder / f"{cell.name}.json", {**record, "sources": sources(cell)})
    if failed:
        listed = "\n".join(f"  {name}: {why}" for name, why in failed.items())
        raise RuntimeError(
            f"cells that failed: {len(failed)}; the others are kept in {folder}, and the same "
            f"command goes on with what is missing:\n{listed}"
        )
    return Found({cell.name: found.cells[cell.name] for cell in cells})


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    # Cross-entropy's gradients of samples that are right underflow, and subnormals are slow: 4x.
    torch.set_flush_denormal(True)


def _timed(run: Callable[[Cell], dict[str, Any]], cell: Cell) -> dict[str, Any]:
    began = time.perf_counter()
    result = run(cell)
    return {"result": result, "seconds": time.perf_counter() - began}


def _write(path: Path, record: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "+".join(map(_text, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in text)
