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

# Okabe and Ito's colours, told apart by colour-blind readers; the shapes serve black and white.
BLACK, ORANGE, BLUE, PURPLE = "#000000", "#D55E00", "#0072B2", "#CC79A7"
LOOKS = {
    "anchor": ("o", BLACK),
    "shard": ("|", BLUE),
    "composed": ("P", BLUE),
    "forgotten": ("X", PURPLE),
    "head": ("o", ORANGE),
    "ordinary": ("s", ORANGE),
}


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        kind: A key of `LOOKS`, or "exact".
        name: What to call it.
        images: Training images it has seen, those of its anchor's head included.
        accuracy: On the scored images, 0 to 1.
        seconds: To get it from what the rows above made.
    """

    kind: str
    name: str
    images: int
    accuracy: float
    seconds: float


@dataclass
class Results:
    """Everything that is shown.

    Attributes:
        model: The backbone, and what is trained of it.
        setting: Data, parts, scoring, seed.
        classes: Class names.
        own: Indices of the classes that the forgotten shard has most images of.
        forgotten: The number of the shard that is forgotten.
        rows: The models.
        recalls: Of each class, 0 to 1: composed, one shard forgotten, and the anchor.
        facts: What was checked.
        seconds: Time of everything.
    """

    model: str
    setting: str
    classes: Sequence[str]
    own: Sequence[int]
    forgotten: int
    rows: list[Row] = field(default_factory=list)
    recalls: dict[str, Sequence[float]] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, kind: str, name: str, images: int, accuracy: float, seconds: float) -> None:
        """Append a row."""
        self.rows.append(Row(kind, name, images, accuracy, seconds))

    def of(self, kind: str) -> list[Row]:
        """The rows of a kind."""
        return [row for row in self.rows if row.kind == kind]


def print_table(
    title: str, caption: str, rows: Sequence[Row], facts: Sequence[str], console: Console
) -> None:
    """Print the models, then what was found and checked."""
    table = Table(title=f"\n{title}", caption=caption)
    table.add_column("model")
    for name in ("training images", "accuracy", "seconds"):
        table.add_column(name, justify="right")
    previous = ""
    for row in rows:
        if row.kind != previous and row.kind in ("shard", "composed", "forgotten", "exact"):
            table.add_section()
        previous = row.kind
        cells = (f"{row.images:,}", f"{100 * row.accuracy:.1f} %", f"{row.seconds:.2f}")
        bold = row.kind in ("composed", "forgotten")
        table.add_row(row.name, *cells, style="bold" if bold else "")
    console.print(table)
    for fact in facts:
        console.print(f"  [green]✓[/green] {fact}", highlight=False)


def draw(results: Results) -> Figure:
    """Accuracy of every model, recall of every class before and after forgetting, and times."""
    style: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=[1.25, 1.25, 0.8])
        _accuracies(left, results)
        _recalls(middle, results)
        _times(right, results)
    return figure


def _accuracies(axes: Axes, results: Results) -> None:
    """A line to each kind of model; the shards share one."""
    names = []
    for kind, (marker, colour) in LOOKS.items():
        rows = results.of(kind)
        scores = [100 * row.accuracy for row in rows]
        place = len(names)
        axes.plot(
            scores, [place] * len(scores), marker, color=colour, markersize=9, markeredgewidth=2
        )
        label = f"{min(scores):.1f} to {max(scores):.1f}" if len(scores) > 1 else f"{scores[0]:.1f}"
        offset: dict[str, Any] = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(label, (max(scores), place), **offset)
        names.append(f"each of {len(rows)} shards alone" if len(rows) > 1 else rows[0].name)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.margins(x=0.2)
    axes.set_xlabel("test accuracy, %")
    axes.set_title("Shards apart, composed, or pooled", loc="left")


def _recalls(axes: Axes, results: Results) -> None:
    """Bars for each class: composed, and after the shard was forgotten."""
    width = 0.4
    places = range(len(results.classes))
    looks = {"composed": (BLUE, "", -width / 2), "forgotten": (PURPLE, "///", width / 2)}
    labels = {"composed": "composed", "forgotten": f"shard {results.forgotten} forgotten"}
    for kind, (colour, hatch, shift) in looks.items():
        axes.bar(
            [place + shift for place in places],
            [100 * value for value in results.recalls[kind]],
            width,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=labels[kind],
        )
    anchor = [100 * value for value in results.recalls["anchor"]]
    starts, ends = ([place + shift for place in places] for shift in (-0.45, 0.45))
    axes.hlines(anchor, starts, ends, color=BLACK, linewidth=1.5, label="head only, public images")
    axes.set_xticks(places, results.classes)
    for place in results.own:
        axes.get_xticklabels()[place].set_fontweight("bold")
    axes.set_xlabel(f"class; bold: most of its images were in shard {results.forgotten}")
    axes.set_ylabel("test images recognised, %")
    axes.set_ylim(0, 128)
    axes.set_yticks(range(0, 101, 20))
    axes.legend(
        frameon=False, loc="upper center", ncols=2, fontsize=8, handlelength=1.5, columnspacing=1
    )
    axes.set_title("One shard forgotten, bit for bit", loc="left")


def _times(axes: Axes, results: Results) -> None:
    """Seconds, on a logarithmic scale."""
    bars = [
        ("fine-tune on\nall images pooled", results.of("ordinary")[0].seconds, ORANGE),
        ("train\none shard", results.of("shard")[0].seconds, BLUE),
        ("compose", results.of("composed")[0].seconds, BLUE),
        ("forget", results.of("forgotten")[0].seconds, PURPLE),
    ]
    names, seconds, colours = zip(*bars, strict=True)
    found = axes.barh(names, seconds, color=colours)
    axes.bar_label(
        found,
        [f"{value:.0f} s" if value >= 10 else f"{value:.1f} s" for value in seconds],
        padding=3,
    )
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title("Time", loc="left")
