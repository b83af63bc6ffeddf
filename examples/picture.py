"""Print a demo's table, and draw the picture of the demo of shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

# Okabe and Ito's colours, told apart by colour-blind readers.
BLACK, ORANGE, BLUE, PURPLE, GREY = "#000000", "#D55E00", "#0072B2", "#CC79A7", "#666666"
BESIDE: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        kind: What it is, for the picture.
        name: What to call it.
        images: Training images it has seen, those of its anchor's head included.
        accuracy: On the scored images, 0 to 1.
        seconds: To get it from what the rows above made, without `solve`.
        solve: Seconds of the solve, after something was forgotten.
        shards: Number of the shards that it was composed of; 0 if it is not of shards.
    """

    kind: str
    name: str
    images: int
    accuracy: float
    seconds: float
    solve: float = 0.0
    shards: int = 0

    @property
    def percent(self) -> float:
        """The accuracy."""
        return 100 * self.accuracy


@dataclass
class Results:
    """Everything that is shown.

    Attributes:
        model: The backbone, and what is trained of it.
        setting: Data, parts, scoring, seed.
        rows: The models.
        facts: What was checked.
        seconds: Time of everything.
    """

    model: str
    setting: str
    rows: list[Row] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(
        self,
        kind: str,
        name: str,
        images: int,
        accuracy: float,
        seconds: float,
        solve: float = 0.0,
        shards: int = 0,
    ) -> None:
        """Append a row."""
        self.rows.append(Row(kind, name, images, accuracy, seconds, solve, shards))

    def of(self, kind: str) -> list[Row]:
        """The rows of a kind."""
        return [row for row in self.rows if row.kind == kind]


def duration(seconds: float) -> str:
    """With two digits, and its unit."""
    if seconds < 0.1:
        return f"{1000 * seconds:.2g} ms"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def print_table(
    title: str, caption: str, rows: Sequence[Row], facts: Sequence[str], console: Console
) -> None:
    """Print the models, then what was found and checked."""
    table = Table(title=f"\n{title}", caption=caption)
    table.add_column("model")
    for name in ("training images", "accuracy", "time"):
        table.add_column(name, justify="right")
    previous = ""
    for row in rows:
        if row.kind != previous and row.kind in ("mean", "statistics", "no shard", "exact"):
            table.add_section()
        previous = row.kind
        cells = (f"{row.images:,}", f"{row.percent:.1f} %", duration(row.seconds + row.solve))
        bold = row.kind in ("statistics", "no shard", "no image")
        table.add_row(row.name, *cells, style="bold" if bold else "")
    console.print(table)
    for fact in facts:
        console.print(f"  [green]✓[/green] {fact}", highlight=False)


def draw(results: Results) -> Figure:
    """Accuracy by number of shards, and the times to forget."""
    style: dict[Any, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(13, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
        _accuracies(left, results)
        _times(right, results)
    return figure


def _accuracies(axes: Axes, results: Results) -> None:
    """A line over the numbers of shards for each way to compose, and level lines of the others."""
    lines = {
        "statistics": ("sum of statistics", BLUE, "o-", 3.5),
        "mean": ("mean of deltas", ORANGE, "s-", 2.0),
    }
    levels = {
        "ordinary": "ordinary fine-tuning, all images",
        "head": "linear head, all images",
        "anchor": f"linear head, {results.of('anchor')[0].images} public images",
    }
    ends = []
    for kind, name in levels.items():
        row = results.of(kind)[0]
        axes.axhline(row.percent, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        ends.append((row.percent, f"{name}  {row.percent:.1f}", GREY, "normal"))
    for kind, (name, colour, style, width) in lines.items():
        rows = results.of(kind)
        shards, scores = [row.shards for row in rows], [row.percent for row in rows]
        axes.plot(shards, scores, style, color=colour, linewidth=width, markersize=8, zorder=3)
        ends.append((scores[-1], f"{name}  {scores[-1]:.1f}", colour, "bold"))
    _forgotten(axes, results)
    numbers = [row.shards for row in results.of("statistics")]
    axes.set_xscale("log")
    axes.set_xlim(numbers[0] / 1.15, numbers[-1] * 1.12)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel("shards that the same images are dealt into")
    axes.set_ylabel("test images recognised, %")
    low, high = min(end[0] for end in ends), max(row.percent for row in results.rows)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.1 * (high - low))
    ends.sort()
    gap = 0.075 * (high - low)
    for place, (score, text, colour, weight) in zip(
        spread([end[0] for end in ends], gap), ends, strict=True
    ):
        axes.annotate(
            text, (1, score), xycoords=("axes fraction", "data"), xytext=(1.02, place),
            textcoords=("axes fraction", "data"), color=colour, va="center", weight=weight,
            annotation_clip=False,
        )  # fmt: skip
    axes.set_title("Statistics add up: shards cost no accuracy", loc="left", weight="bold")


def _forgotten(axes: Axes, results: Results) -> None:
    """A cross for the model that has forgotten a shard, a ring for the one without one image."""
    (shard,), (image,) = results.of("no shard"), results.of("no image")
    place = next(row.shards for row in results.of("statistics")[1:])
    looks: dict[str, Any] = {"color": PURPLE, "linestyle": "none", "zorder": 4}
    axes.plot(place, shard.percent, "X", markersize=11, **looks)
    axes.plot(place, image.percent, "o", markersize=13, mfc="none", markeredgewidth=2.5, **looks)
    for row, offset in ((shard, (12, -4)), (image, (12, 10))):
        axes.annotate(
            f"{row.name}  {row.percent:.1f}", (place, row.percent), xytext=offset, color=PURPLE,
            textcoords="offset points",
        )  # fmt: skip


def _times(axes: Axes, results: Results) -> None:
    """Seconds to forget: by training again, and by a ledger of statistics and a solve."""
    again = results.of("ordinary")[0].seconds
    rows = {"one image": results.of("no image")[0], "a shard": results.of("no shard")[0]}
    axes.barh("ordinary\nfine-tuning", again, color=GREY, height=0.5)
    axes.annotate(f"{duration(again)}: train again", (again, 0), **BESIDE)
    for place, (name, row) in enumerate(rows.items(), start=1):
        name = f"statistics,\n{name}"
        axes.barh(name, row.seconds, color=PURPLE, height=0.5)
        axes.barh(name, row.solve, left=row.seconds, color=BLUE, height=0.5)
        end = (row.seconds + row.solve, place)
        axes.annotate(f"{duration(row.seconds)} to forget", end, color=PURPLE, **BESIDE)
    axes.margins(x=0.35)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title("Forgotten bit for bit", loc="left", weight="bold")


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places of labels, in rising order, moved apart to be at least `gap` from each other.

    Labels that would overlap are centred on where they belong.
    """
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _start(groups[-1], gap) < _start(groups[-2], gap) + gap * len(
            groups[-2]
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_start(group, gap) + gap * k for group in groups for k in range(len(group))]


def _start(group: Sequence[float], gap: float) -> float:
    """Where the first label of a group is that is centred on its places' mean."""
    return sum(group) / len(group) - gap * (len(group) - 1) / 2
