"""Measured figures, written from stored results into the pages that state them.

    python -m benchmarks.publish            # rewrites what stands between the markers
    python -m benchmarks.publish --check    # exits 1 and names what is stale

A page says where: `<!-- measured:NAME -->`, and `<!-- /measured -->` on lines of their own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cluster_arithmetic import table as cluster_table
from benchmarks.grouped import grouped_table
from benchmarks.precision_table import precision_table, read_precision
from benchmarks.privacy_table import accuracy_table, read_accuracy, read_speed, speed_table
from benchmarks.record import ROOT
from benchmarks.rivals import Answers, by_case, fastest_yardstick, ratio, yardstick
from benchmarks.shards_scale import scale_table
from benchmarks.stored import COMPILED, RESULTS, SUITE, BadFile, conditions, newest
from benchmarks.study_table import read_study, study_table
from benchmarks.suite.case import Case
from benchmarks.suite.row import Result, Row
from benchmarks.targets import DUAL_FORWARD, SAVED, STEP, judge
from benchmarks.units import amount, duration

PUBLISHED = ("benchmarks.md", "precision.md", "promises/privacy.md", "cluster.md")
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in PUBLISHED),
)
OTHERS: dict[str, Callable[[], str]] = {  # of files that are not the suite's
    "study": lambda: study_table(read_study()),
    "precision": lambda: precision_table(read_precision()),
    "privacy-speed": lambda: speed_table(read_speed()),
    "privacy-accuracy": lambda: accuracy_table(read_accuracy()),
    "shards-scale": lambda: scale_table(json.loads(SCALE.read_text(encoding="utf-8"))),
    "cluster-arithmetic": cluster_table,
    "grouped": lambda: grouped_table(json.loads(GROUPED.read_text(encoding="utf-8"))),
}
SCALE = RESULTS / "shards" / "scale.json"
GROUPED = RESULTS / "grouped" / "cpu.json"
NOT_MEASURED = "Not measured yet."
NOTHING = "–"
BEGIN = re.compile(r"^<!-- measured:(?P<name>\S+) -->$", re.MULTILINE)
END = "<!-- /measured -->"

ATTENTION = {
    "attention-forward": "Forward with tangent",
    "attention-backward": "Backward of the tangent",
    "attention-second-order": "Backward of both",
}


# --- what can be stated --------------------------------------------------------------------------


def cpu_ratios(result: Result) -> str:
    """The three ratios that the project promises on a CPU."""
    rows = []
    for target in (DUAL_FORWARD, STEP, SAVED):
        found = judge(target, result)
        measured = NOTHING if found.value is None else f"{found.value:.3f}"
        rows.append((target.name, measured, f"{target.sense} {target.bound:.2f}", found.verdict))
    return _table(("", "measured", "target", ""), rows)


def attention(result: Result) -> str:
    """A table per direction and dtype, a line per shape: every provider, the fastest yardstick."""
    parts = []
    cases = by_case(row for row in result.rows if row.case.group in ATTENTION)
    for group, dtype in dict.fromkeys((case.group, case.dtype) for case in cases):
        chosen = {c: a for c, a in cases.items() if (c.group, c.dtype) == (group, dtype)}
        parts.append(f"{ATTENTION[group]}, {dtype}:\n\n{_attention_table(chosen)}")
    return "\n\n".join(parts) or NOT_MEASURED


def _attention_table(cases: Mapping[Case, Answers]) -> str:
    rows = [row for answers in cases.values() for row in answers.values() if not yardstick(row)]
    timed = {row.provider for row in rows if row.seconds is not None}
    names = [name for name in dict.fromkeys(row.provider for row in rows) if name in timed]
    lines = []
    for case, answers in cases.items():
        base = fastest_yardstick(answers)
        shape = "x".join(map(str, case.shape)) + (" causal" if case.causal else "")
        cells = [_timed(answers.get(name), base) for name in names]
        plain = NOTHING if base is None else f"{_timed(base)} ({base.provider})"
        lines.append((shape, *cells, plain))
    return _table(("B x H x N x D", *names, "PyTorch's fastest, no tangent"), lines)


def end_to_end(result: Result) -> str:
    """Whole models: a line per provider, and its ratios to fine-tuning."""
    cases = by_case(row for row in result.rows if row.case.group in ("model-forward", "train-step"))
    lines = []
    for op, shape, dtype in dict.fromkeys((c.op, c.shape, c.dtype) for c in cases):
        forward = cases.get(Case("model-forward", op, shape, dtype), {})
        step = cases.get(Case("train-step", op, shape, dtype), {})
        for name in dict.fromkeys((*forward, *step)):
            known = step.get(name)
            cells = (
                _timed(forward.get(name), forward.get("finetune")),
                _timed(known, step.get("finetune")),
                _bytes(known.saved_bytes if known else None),
                _bytes(known.peak_bytes if known else None),
            )
            if any(cell != NOTHING for cell in cells):
                lines.append((f"{op}, batch {shape[0]}, {dtype}", name, *cells))
    if not lines:
        return NOT_MEASURED
    return _table(("model", "", "forward", "step", "saved for backward", "peak of a step"), lines)


@dataclass(frozen=True)
class Figure:
    """What a marker states: a text per result of the file, on the kinds of device."""

    write: Callable[[Result], str]
    kinds: Sequence[str]  # "cpu", "gpu"
    file: str = SUITE
    command: str | None = None  # that measures it, where the file is not the suite's


FIGURES = {  # by the name in a marker
    "cpu-ratios": Figure(cpu_ratios, ("cpu",)),
    "cpu-attention": Figure(attention, ("cpu",)),
    "gpu-attention": Figure(attention, ("gpu",)),
    "end-to-end": Figure(end_to_end, ("cpu", "gpu")),
    # On CUDA the suite compiles too.
    "compiled": Figure(end_to_end, ("cpu",), COMPILED, "make bench-compiled"),
}


def text_of(name: str, results: Iterable[Result]) -> str:
    """The markdown of a figure, from what its file holds for all devices."""
    figure = FIGURES[name]
    chosen = [r for r in results if ("gpu" if "gpu" in r.environment else "cpu") in figure.kinds]
    parts = [f"{figure.write(r)}\n\n{_circumstances(r, figure.command)}" for r in chosen]
    return "\n\n".join(parts) or NOT_MEASURED


def _circumstances(result: Result, command: str | None) -> str:
    command = command or ("make gpu-bench" if "gpu" in result.environment else "make bench")
    malloc = result.environment.get("malloc", "defaults")
    kept = "" if malloc == "defaults" else f", `{malloc}`"
    return f"Medians. {conditions(result)}{kept}; `{command}`."


def _timed(row: Row | None, base: Row | None = None) -> str:
    """Its median, and the ratio to the base's."""
    if row is None or row.seconds is None:
        return NOTHING
    times = ratio(row, base)
    return duration(row.seconds) + ("" if times is None else f" ({times:.2f}x)")


def _bytes(count: int | None) -> str:
    return NOTHING if count is None else amount(count)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- the pages -----------------------------------------------------------------------------------


def all_stored() -> dict[str, list[Result]]:
    """The newest results of every device, by file name.

    Raises:
        BadFile: one cannot be read.
    """
    return {name: list(newest(RESULTS, name).values()) for name in (SUITE, COMPILED)}


def rewritten(page: Path, stored: Mapping[str, Sequence[Result]]) -> tuple[str, list[str]]:
    """The page with fresh figures, and the names of those that were stale.

    Raises:
        BadFile: it or a stored file cannot be read, a marker has an unknown name, or one is not
            closed.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as problem:
        raise BadFile(f"{page}: {problem.strerror}") from None
    parts, stale, position = [], [], 0
    for begin in BEGIN.finditer(text):
        name = begin["name"]
        if name not in (*FIGURES, *OTHERS):
            known = ", ".join((*FIGURES, *OTHERS))
            raise BadFile(f"{page}: unknown measured:{name}; there are {known}")
        end, following = text.find(END, begin.end()), BEGIN.search(text, begin.end())
        if end < 0 or (following and following.start() < end):
            raise BadFile(f"{page}: measured:{name} is not closed by {END}")
        figure = OTHERS[name]() if name in OTHERS else text_of(name, stored[FIGURES[name].file])
        fresh = f"\n{figure}\n"
        if text[begin.end() : end] != fresh:
            stale.append(name)
        parts += [text[position : begin.end()], fresh]
        position = end
    return "".join([*parts, text[position:]]), stale


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    options = parser.parse_args()
    try:
        stored = all_stored()
        pages = {page: rewritten(page, stored) for page in PAGES}
    except BadFile as problem:
        print(problem, file=sys.stderr)
        return 2
    for page, (text, stale) in pages.items():
        if stale and not options.check:
            partial = page.with_name(page.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(page)
        for name in stale:
            print(f"{page}: {name} {'is stale' if options.check else 'written'}")
    if not any(stale for _, stale in pages.values()):
        print("every measured figure is that of the stored results")
        return 0
    return 1 if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
