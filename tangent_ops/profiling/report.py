"""Reports of a comparison: a table in the terminal, a JSON file, a self-contained HTML page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tangent_ops.pages import rendered
from tangent_ops.profiling.families import (
    ACTIVATION,
    ATTENTION,
    COPY,
    ELEMENTWISE,
    FAMILIES,
    GEMM,
    MEANING,
    NORM,
    OTHER,
)
from tangent_ops.profiling.profile import Comparison, Side
from tangent_ops.profiling.sides import Settings

SCHEMA = 1  # of profile.json
_STEADY = 1.5  # slowest step over fastest one; above it a remark calls the times unreliable

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    ATTENTION: "#0072B2",
    GEMM: "#E69F00",
    NORM: "#009E73",
    ACTIVATION: "#CC79A7",
    ELEMENTWISE: "#F0E442",
    COPY: "#56B4E9",
    OTHER: "#999999",
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what is shown.
        cells: of each side, its value and the ratio ours / this one, as text; "" where there is
            none.
        summary: whether it is a sum or a property of the whole step.
    """

    name: str
    cells: list[tuple[str, str]]
    summary: bool = False


@dataclass(frozen=True)
class Segment:
    """A part of a side's bar, in percent of the longest bar."""

    family: str
    colour: str
    left: float
    width: float
    milliseconds: float
    share: float


def rows(comparison: Comparison) -> list[Row]:
    """The table: milliseconds of every family, their sum, wall time of a step, peak memory."""

    def row(name: str, of: Callable[[Side], float], show=_milliseconds, summary=True) -> Row:
        cells = []
        for side in comparison.sides:
            if side.error is not None:
                cells.append(("failed", ""))
                continue
            ratio = ""
            if side is not comparison.ours and comparison.ours.error is None and of(side) > 0:
                ratio = f"{of(comparison.ours) / of(side):.2f}"
            cells.append((show(of(side)), ratio))
        return Row(name, cells, summary)

    families = [
        row(name, lambda side, name=name: side.families[name], summary=False) for name in FAMILIES
    ]
    return [
        *families,
        row("sum", lambda side: side.total),
        row("wall time", lambda side: side.wall_median),
        row("peak memory", lambda side: side.peak, show=_bytes),
    ]


def conditions(comparison: Comparison) -> list[tuple[str, str]]:
    """What was run, on which machine, and how it was measured: (name, text) for people to read."""
    settings = comparison.settings
    trained = "all parameters" if settings.blocks is None else f"last {settings.blocks} blocks"
    step = {
        "forward": "forward pass under no_grad",
        "train": "forward, cross-entropy, backward, zero_grad; no optimizer",
    }[settings.mode]
    return [
        ("command", command(settings)),
        (
            "model",
            f"{settings.model}, random weights (timings do not depend on them), eval mode; "
            f"{trained} trained",
        ),
        ("step", f"{step}; {settings.batch} images, all in {settings.dtype}"),
        (
            "by family",
            f"{_clock(settings)}, in the step with the median sum of {settings.steps} under the "
            "profiler",
        ),
        ("wall time", f"median of {settings.steps} steps without the profiler, sides in turns"),
        ("peak memory", "of one step, above what was there before it (weights, deltas, images)"),
        *comparison.environment.items(),
    ]


def command(settings: Settings) -> str:
    """The command line with these settings."""
    words = ["tangent-ops", "profile", "--model", settings.model, "--batch", settings.batch]
    words += ["--dtype", settings.dtype]
    for rival in settings.against:
        words += ["--against", rival]
    words += ["--mode", settings.mode, "--device", settings.device]
    if settings.blocks is not None:
        words += ["--blocks", settings.blocks]
    words += ["--steps", settings.steps, "--warmup", settings.warmup, "--out", settings.out]
    return shlex.join(map(str, words))


def remarks(comparison: Comparison) -> list[str]:
    """Warnings about the numbers: which sides failed, and whose steps vary."""
    found = []
    for side in comparison.sides:
        if side.error is not None:
            found.append(f"{side.name} failed: {side.error}")
        elif max(side.wall) > _STEADY * min(side.wall):
            low, high = (_milliseconds(pick(side.wall)) for pick in (min, max))
            found.append(
                f"{side.name}: steps took {low} to {high} ms, so its times are not reliable: "
                "the machine is busy, or --steps or --warmup is too small"
            )
    return found


def print_table(comparison: Comparison, console: Console) -> None:
    """Print the table, what failed, and the conditions."""
    settings = comparison.settings
    table = Table(
        title=f"{settings.model}, batch {settings.batch}, {settings.dtype}, {settings.mode}: "
        "ms of a step",
        title_justify="left",
    )
    table.add_column("")
    for side in comparison.sides:
        table.add_column(side.name, justify="right")
        if side is not comparison.ours:
            table.add_column("ours / it", justify="right")
    lines = rows(comparison)
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        first, *others = line.cells
        table.add_row(
            line.name,
            first[0],
            *(text for cell in others for text in cell),
            style="bold" if line.summary else "",
            end_section=following is not None and following.summary and not line.summary,
        )
    console.print(table)
    for remark in remarks(comparison):
        console.print(f"  {remark}", markup=False, highlight=False, soft_wrap=True, style="red")
    for name, text in conditions(comparison):
        console.print(f"{name:>16}  {text}", highlight=False, markup=False, soft_wrap=True)


def write_report(comparison: Comparison) -> list[Path]:
    """Write ``profile.json`` and ``report.html`` to the output folder.

    Returns:
        The paths of these, and of the traces, which `compare` wrote.
    """
    out = comparison.settings.out
    longest = max((side.total for side in comparison.sides), default=0.0)
    page = rendered(
        Path(__file__).parent / "report.html.j2",
        comparison=comparison,
        settings=comparison.settings,
        rows=rows(comparison),
        conditions=conditions(comparison),
        remarks=remarks(comparison),
        bars=[(side, list(_segments(side, longest))) for side in comparison.sides],
        families=[(name, COLOURS[name], meaning) for name, meaning in MEANING.items()],
        clock=_clock(comparison.settings),
        size=_bytes,
        kind="kernels" if _on_cuda(comparison.settings) else "operations",
    )
    paths = [out / "profile.json", out / "report.html"]
    numbers = json.dumps(as_json(comparison), indent=2) + "\n"
    for path, text in zip(paths, (numbers, page), strict=True):
        partial = path.with_name(path.name + ".partial")  # whole or not at all
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return paths + [out / side.trace for side in comparison.sides if side.trace]


def as_json(comparison: Comparison) -> dict[str, object]:
    """What ``profile.json`` holds: times in milliseconds of a step, memory in bytes."""
    settings = comparison.settings
    return {
        "schema": SCHEMA,
        "command": command(settings),
        "settings": {**asdict(settings), "out": str(settings.out)},
        "environment": comparison.environment,
        "sides": [asdict(side) for side in comparison.sides],
    }


def _segments(side: Side, longest: float) -> Iterator[Segment]:
    left = 0.0
    for name, milliseconds in side.families.items():
        width = 100 * milliseconds / longest
        yield Segment(
            name, COLOURS[name], left, width, milliseconds, 100 * milliseconds / side.total
        )
        left += width


def _on_cuda(settings: Settings) -> bool:
    return settings.device.startswith("cuda")


def _clock(settings: Settings) -> str:
    if _on_cuda(settings):
        return "device time of kernels, copies and fills"
    return "self CPU time of operations"


def _milliseconds(value: float) -> str:
    return f"{value:,.3f}" if value < 10 else f"{value:,.1f}"


def _bytes(value: float) -> str:
    return f"{value / 2**20:,.1f} MiB"
