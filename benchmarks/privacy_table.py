"""Tables of private training, from the files of `benchmarks.privacy` and the study."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stored import RESULTS, BadFile

SPEED = RESULTS / "privacy" / "cpu.json"
ACCURACY = RESULTS / "privacy" / "accuracy.json"
WAYS = {
    "tangent": "TAFT-1",
    "ordinary": "ordinary fine-tuning of the same block (Opacus)",
    "probe": "linear probe",
}
NOT_MEASURED = "Not measured yet."


@dataclass(frozen=True)
class Step:
    """A training step: median seconds, and the peak of what it allocates."""

    name: str
    seconds: float
    peak: int


def read_speed(path: Path = SPEED) -> Mapping[str, Any] | None:
    """What `benchmarks.privacy` wrote; None if nothing is there.

    Raises:
        BadFile: it is no file of it.
    """
    return _read(path, speed_table)


def read_accuracy(path: Path = ACCURACY) -> Mapping[str, Any] | None:
    """What `examples/private_study.py` wrote; None if nothing is there.

    Raises:
        BadFile: it is no file of it.
    """
    return _read(path, accuracy_table)


def _read(path: Path, table: Callable[[Mapping[str, Any] | None], str]) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        table(found)
    except (KeyError, TypeError, ValueError, StopIteration) as problem:
        raise BadFile(f"{path} is not what it should be: {problem}") from None
    return found


def speed_table(found: Mapping[str, Any] | None) -> str:
    """A line per kind of step: time and memory, and how many times the ordinary step's."""
    if found is None:
        return NOT_MEASURED
    batches = {count: [Step(**row) for row in rows] for count, rows in found["rows"].items()}
    names = [step.name for step in next(iter(batches.values()))]
    headings = [f"batch {count}: {what}" for count in batches for what in ("step", "peak memory")]
    lines = ["| step | " + " | ".join(headings) + " |"]
    lines.append("| " + " | ".join(["---"] * (1 + len(headings))) + " |")
    for name in names:
        cells = [name]
        for steps in batches.values():
            base = next(step for step in steps if step.name == "taft")
            step = next(step for step in steps if step.name == name)
            cells.append(f"{1e3 * step.seconds:.0f} ms ({step.seconds / base.seconds:.2f}x)")
            cells.append(f"{step.peak / 1e6:.0f} MB ({step.peak / base.peak:.2f}x)")
        lines.append("| " + " | ".join(cells) + " |")
    about = found["environment"]
    where = f"{about['cpu']}, torch {about['torch']}, commit {about['commit']}, {about['date']}"
    said = f"{found['setting']}. Medians. {where}; `python -m benchmarks.privacy`."
    return "\n".join([*lines, "", said])


def accuracy_table(found: Mapping[str, Any] | None) -> str:
    """A line per way to train, a column per ε: mean and standard error over the seeds."""
    if found is None:
        return NOT_MEASURED
    scores: dict[str, list[float]] = {}
    for name, run in found["runs"].items():
        scores.setdefault(name.partition("/")[2], []).append(run["accuracy"])
    epsilons = sorted({float(kind.split("/")[1]) for kind in scores if "/" in kind})
    headings = ["trained by", *(f"ε = {epsilon:g}" for epsilon in epsilons)]
    lines = ["| " + " | ".join(headings) + " |", "| " + " | ".join(["---"] * len(headings)) + " |"]
    for way, said in WAYS.items():
        cells = [_mean(scores[f"{way}/{epsilon:g}"]) for epsilon in epsilons]
        lines.append("| " + " | ".join([said, *cells]) + " |")
    _, _, public, private = found["sizes"]
    options = "; ".join(
        f"{WAYS[way]}: {', '.join(f'{k} {v:g}' for k, v in chosen.items())}"
        for way, chosen in found["options"].items()
    )
    count = len(scores["anchor"])
    said = (
        f"Accuracy in %, mean and standard error of {count} seeds (split, anchor and noise), on "
        f"{found['sizes'][0]} test images; δ = {found['delta']:g}. MNIST-5k: {public} public ones "
        f"for the anchor's head, which alone reaches {_mean(scores['anchor'])}; {private} private "
        f"ones, with which TAFT-1 without privacy reaches {_mean(scores['tangent, not private'])}. "
        f"{options}. Options were chosen on the validation images of seed 0 at ε = 3. torch "
        f"{found['torch']}, {found['date']}; `python examples/private_study.py`."
    )
    return "\n".join([*lines, "", said])


def _mean(scores: Sequence[float]) -> str:
    error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
    return f"{100 * statistics.mean(scores):.1f} ± {100 * error:.1f}"
