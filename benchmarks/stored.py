"""Results as pytest-benchmark stores them (``--benchmark-json``), read and checked."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.case import Case
from tools.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"
OURS = ("ours", "taft-all")  # of an op, of a model


class BadFile(Exception):
    """A file or folder cannot be used; the message is one line that names it and says why."""


@dataclass(frozen=True)
class Row:
    """A provider's answer to a case. Times in seconds, memory in bytes."""

    case: Case
    provider: str
    status: str = "ok"  # or "wrong" (so not timed), "failed" (raised), "absent" (cannot run here)
    note: str = ""  # why
    error: float | None = None  # relative, against the exact answer; the worst of its results
    seconds: float | None = None  # the median; of several turns the median of their medians
    lower: float | None = None  # the first quartile
    upper: float | None = None  # the third
    called: float | None = None  # with Python and launches, where replays of a graph are timed
    peak_bytes: int | None = None  # allocated at most during the call, above what was there before
    saved_bytes: int | None = None  # by autograd for the backward pass, parameters not counted
    flops: float = 0.0  # the least operations that its question needs
    bytes: float = 0.0  # the least memory traffic

    @property
    def plain(self) -> bool:
        """Whether its provider is PyTorch's ordinary computation, without a tangent."""
        return self.provider.startswith("sdpa-") or self.provider in ("plain", "finetune")


Answers = Mapping[str, Row]  # by provider


@dataclass(frozen=True)
class Result:
    """All rows of one run, with its circumstances."""

    environment: Mapping[str, str]  # machine, versions, commit, clocks, date
    ceilings: Mapping[str, float]  # of the machine in this run: "bytes/s", "flops/s fp32" ...
    rows: Sequence[Row]  # in the order they were measured

    @property
    def kind(self) -> str:
        return "gpu" if "gpu" in self.environment else "cpu"

    @property
    def device(self) -> str:
        """ "cpu", or the GPU's name in lower case with dashes: fit for a file's name."""
        name = self.environment.get("gpu", "cpu")
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    @property
    def conditions(self) -> str:
        """Where and when the numbers were taken, in one line."""
        about = self.environment
        parts = [about.get("gpu", about.get("cpu", "unknown machine"))]
        if self.kind == "cpu":
            parts.append(f"{about.get('threads', '?')} threads")
        named = [name for name in ("torch", "triton", "timm", "commit") if name in about]
        parts += [f"{name} {about[name]}" for name in named]
        return ", ".join([*parts, about.get("date", "unknown date")])

    def by_case(self) -> dict[Case, dict[str, Row]]:
        """Rows by case, then by provider."""
        found: dict[Case, dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault(row.case, {})[row.provider] = row
        return found


def read(paths: Iterable[Path]) -> Result:
    """The result in one or several JSON files of a run, or in the JSON files of a folder.

    Environment and ceilings are those of the first file.

    Raises:
        BadFile: a file cannot be read, is none of the suite's, or nothing was measured.
    """
    some = [sorted(path.glob("*.json")) if path.is_dir() else [path] for path in paths]
    results = [_parsed(file) for file in itertools.chain(*some)]
    rows = [row for one in results for row in one.rows]
    if not rows:
        raise BadFile(f"{', '.join(map(str, paths))}: nothing was measured")
    return Result(results[0].environment, results[0].ceilings, rows)


def _parsed(file: Path) -> Result:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise BadFile(f"{file}: {problem.strerror}") from None
    except ValueError as problem:  # no JSON, or no text
        raise BadFile(f"{file} is not JSON: {problem}") from None
    try:
        own = content["tangent_ops"]
        rows = _rows(content["benchmarks"])
        rows += [Row(**{**one, "case": _case(one["case"])}) for one in own["not_timed"]]
        return Result(own["environment"], own["ceilings"], rows)
    except (AttributeError, KeyError, TypeError) as problem:
        raise BadFile(
            f"{file} is not a result of the suite ({type(problem).__name__}: {problem}): "
            "`pytest benchmarks --benchmark-only --benchmark-json=FILE` writes one"
        ) from None


def _rows(benchmarks: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row per case and provider; benchmarks of no suite are left out."""
    turns: dict[tuple[Case, str], list[Mapping[str, Any]]] = {}
    for one in benchmarks:
        if "case" in (info := one["extra_info"]):
            turns.setdefault((_case(info["case"]), info["provider"]), []).append(one)
    rows = []
    for (case, _), several in turns.items():
        times = {
            own: statistics.median(one["stats"][theirs] for one in several)
            for own, theirs in {"seconds": "median", "lower": "q1", "upper": "q3"}.items()
        }
        rows.append(Row(**{**several[0]["extra_info"], "case": case, **times}))
    return rows


def _case(entry: Mapping[str, Any]) -> Case:
    return Case(**{**entry, "shape": tuple(entry["shape"])})


def newest(folder: Path = RESULTS) -> dict[str, Result]:
    """The latest result of each device, the CPU first: of the files and folders named by date."""
    results = [read([path]) for path in sorted(folder.glob("20*"))]
    results.sort(key=lambda result: result.environment.get("date", ""))
    latest = {result.device: result for result in results}
    return dict(sorted(latest.items(), key=lambda item: (item[0] != "cpu", item[0])))


def folder(name: str) -> Path:
    """The folder of a command's option, made if it is missing."""
    path = Path(name).resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise argparse.ArgumentTypeError(f"{name}: {problem.strerror}; name a folder") from None
    return path


def fastest_plain(answers: Answers) -> Row | None:
    """The fastest ordinary computation that was timed."""
    timed = [row for row in answers.values() if row.plain and row.seconds is not None]
    return min(timed, key=lambda row: row.seconds or 0.0, default=None)


def our_row(answers: Answers) -> Row | None:
    """The library's own, where it was timed."""
    mine = (answers[name] for name in OURS if name in answers)
    return next((row for row in mine if row.seconds is not None), None)


def ratio(row: Row | None, base: Row | None, of: str = "seconds") -> float | None:
    """The row's seconds (or `of`) over the base's; None where one is missing."""
    one, other = (getattr(each, of) if each else None for each in (row, base))
    return one / other if one is not None and other else None
