"""Stored results: read and checked, shown, the newest of each device, their conditions."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.record import ROOT
from benchmarks.suite.row import Result

RESULTS = ROOT / "benchmarks" / "results"
SUITE = "suite.json"
COMPILED = "compiled.json"  # whole models, eager and compiled


class BadFile(Exception):
    """A file or folder cannot be used; the message is one line that names it and says why."""


def read_result(path: Path) -> Result:
    """The suite's result in a JSON file.

    Raises:
        BadFile: there is no such file, it is not one of the suite's, or it has no rows.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise BadFile(f"{path}: {problem.strerror}") from None
    except ValueError as problem:  # no JSON, or no text
        raise BadFile(f"{path} is not JSON: {problem}") from None
    try:
        result = Result.from_json(content)
    except (AttributeError, KeyError, TypeError) as problem:
        raise BadFile(
            f"{path} is not a result of the suite ({type(problem).__name__}: {problem}): "
            "`python -m benchmarks.run --out DIR` writes one"
        ) from None
    if not result.rows:
        raise BadFile(f"{path} has no rows: nothing was measured")
    return result


def show_files(show: Callable[[Result], None], description: str) -> int:
    """A command that shows every FILE it is given; its exit status."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="suite.json")
    try:
        results = {path: read_result(path) for path in parser.parse_args().files}
    except BadFile as problem:
        print(problem, file=sys.stderr)
        return 2
    for path, result in results.items():
        print(path)
        show(result)
    return 0


def device_of(result: Result) -> str:
    """ "cpu", or the GPU's name in lower case with dashes: fit for a file's name."""
    name = result.environment.get("gpu", "cpu")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def newest(folder: Path = RESULTS, name: str = SUITE) -> dict[str, Result]:
    """The latest file of that name in the folders of `folder`, by device; the CPU first.

    Raises:
        BadFile: one cannot be read.
    """
    results = [read_result(path) for path in sorted(folder.glob(f"*/{name}"))]
    results.sort(key=lambda result: result.environment.get("date", ""))
    latest = {device_of(result): result for result in results}
    return dict(sorted(latest.items(), key=lambda item: (item[0] != "cpu", item[0])))


def conditions(result: Result) -> str:
    """Where and when the numbers were taken, in one line."""
    about = result.environment
    parts = [about.get("gpu", about.get("cpu", "unknown machine"))]
    if "gpu" not in about:
        parts.append(f"{about.get('threads', '?')} threads")
    parts += [f"{name} {about[name]}" for name in ("torch", "triton", "timm") if name in about]
    parts += [f"commit {about.get('commit', 'unknown')}", about.get("date", "unknown date")]
    return ", ".join(parts)


def folder_for(out: Path) -> Path:
    """`out`, made if it is missing.

    Raises:
        BadFile: it is a file, or cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise BadFile(f"--out {out} is a file: name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise BadFile(f"--out {out}: {problem.strerror}") from None
    return out
