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
STARTS = ("mean", "statistics", "no image", "exact", "forgotten")  # of a table's sections
BOLD = ("statistics", "no image", "no shard", "forgotten")
BESIDE: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # hides lines behind a label
ABOVE: dict[str, Any] = {"xytext": (8, 6), "textcoords": "offset points", "weight": "bold"}


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
        scored: What the images are that every model is scored on.
        rows: The models.
        facts: What was checked.
        seconds: Time of everything.
    """

    model: str
    setting: str
    scored: str
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
        if row.kind != previous and row.kind in STARTS:
            table.add_section()
        previous = row.kind
        cells = (f"{row.images:,}", f"{row.percent:.1f} %", duration(row.seconds + row.solve))
        table.add_row(row.name, *cells, style="bold" if row.kind in BOLD else "")
    console.print(table)
    for fact in facts:
        console.print(f"  [green]✓[/green] {fact}", highlight=False)


def draw(results: Results) -> Figure:
    """Accuracy by number of shards, and the times to forget."""
    style: dict[Any, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(13.5, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
        _accuracies(left, results)
        _times(right, results)
    return figure


def _accuracies(axes: Axes, results: Results) -> None:
    """A line over the numbers of shards for each way to compose, and level lines of the others."""
    levels = {
        "ordinary": "ordinary fine-tuning, all images",
        "head": "linear head, all images",
        "anchor": f"linear head, {results.of('anchor')[0].images} public images",
    }
    lines = {
        "statistics": ("sum of statistics", BLUE, "o-", 3.5),
        "mean": ("mean of deltas", ORANGE, "s-", 2.0),
    }
    ends = []
    for kind, name in levels.items():
        score = results.of(kind)[0].percent
        axes.axhline(score, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        ends.append((score, f"{score:.1f}  {name}", GREY, "normal"))
    for kind, (name, colour, style, width) in lines.items():
        rows = results.of(kind)
        numbers, scores = [row.shards for row in rows], [row.percent for row in rows]
        axes.plot(numbers, scores, style, color=colour, linewidth=width, markersize=8, zorder=3)
        ends.append((scores[-1], f"{scores[-1]:.1f}  {name}", colour, "bold"))
    for number, score in zip(numbers[:-1], scores[:-1], strict=True):  # of the means
        axes.annotate(f"{score:.1f}", (number, score), color=ORANGE, bbox=PLATE, **ABOVE)
    axes.set_xscale("log")
    axes.set_xlim(numbers[0] / 1.2, numbers[-1] * 1.12)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel("shards that the same images are dealt into")
    axes.set_ylabel(results.scored + " images recognised, %")
    axes.margins(y=0.09)
    low, high = axes.get_ylim()
    ends.sort()
    places = spread([end[0] for end in ends], gap=0.07 * (high - low))
    for place, (score, text, colour, weight) in zip(places, ends, strict=True):
        axes.annotate(
            text, (1, score), xycoords=("axes fraction", "data"), xytext=(1.02, place),
            textcoords=("axes fraction", "data"), color=colour, va="center", weight=weight,
        )  # fmt: skip
    axes.set_title(
        "Statistics add up: one model, however the images are dealt", loc="left", weight="bold"
    )


def _times(axes: Axes, results: Results) -> None:
    """Seconds to forget: by training again, and by a ledger of statistics and a solve."""
    again = results.of("ordinary")[0].seconds
    axes.barh("train again:\nordinary fine-tuning", again, color=GREY, height=0.5)
    axes.annotate(duration(again), (again, 0), **BESIDE)
    for place, (kind, what) in enumerate({"image": "one image", "shard": "a shard"}.items(), 1):
        row = results.of(f"no {kind}")[0]
        name = f"statistics:\n{what}"
        axes.barh(name, row.seconds, color=PURPLE, height=0.5)
        axes.barh(name, row.solve, left=row.seconds, color=BLUE, height=0.5)
        end = row.seconds + row.solve
        times = f"{duration(row.seconds)} to forget, {duration(row.solve)} to solve"
        axes.annotate(f"{times}\n{row.percent:.1f} % afterwards", (end, place), **BESIDE)
    axes.set_xlim(0, 1.25 * max(again, row.seconds + row.solve))
    axes.invert_yaxis()
    axes.set_xlabel("seconds to forget")
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
