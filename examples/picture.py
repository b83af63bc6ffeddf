"""Print a demo's table; keep the results of the demo of shards, and draw their picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tangent_ops import pictures
from tangent_ops.pictures import Look

STARTS = ("mean", "statistics", "no image", "exact", "forgotten")  # of a table's sections
BOLD = ("statistics", "no image", "no shard", "forgotten")
BESIDE: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # hides lines behind a label
ABOVE: dict[str, Any] = {"xytext": (9, 7), "textcoords": "offset points", "bbox": PLATE}


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        kind: What it is, for the picture.
        name: What to call it.
        images: Training images it has seen, those of its anchor's head included.
        accuracy: On the scored images, 0 to 1.
        seconds: To get it from what the rows above made, without `solve`; NaN if not known.
        solve: Seconds of the solve, after something was forgotten.
        shards: Number of the shards that it was composed of; 0 if it is not of shards.
    """

    kind: str
    name: str
    images: int
    accuracy: float
    seconds: float = math.nan
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

    def write(self, path: Path) -> None:
        """Keep them as JSON, to draw the picture again."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `write` has kept; times that are not known may be left out."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**content, "rows": [Row(**row) for row in content["rows"]]})

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


@pictures.styled()
def draw(results: Results) -> Figure:
    """Accuracy by number of shards, and the times to forget."""
    figure = pictures.new_figure(width=11, height=3.9)
    left, right = figure.subplots(1, 2, width_ratios=[1, 0.92])
    _times(right, results)
    _accuracies(left, results)
    return figure


def _accuracies(axes: Axes, results: Results) -> None:
    """A line over the numbers of shards for each way to compose, and level lines of the others."""
    levels = {
        "ordinary": ("ordinary fine-tuning, all images", pictures.ORDINARY),
        "head": ("linear head, all images", pictures.LEVEL),
        "anchor": (f"linear head, {results.of('anchor')[0].images} public images", pictures.LEVEL),
    }
    lines = {
        "statistics": Look("sum of statistics", "o", "-", pictures.EXACT),
        "mean": Look("mean of deltas", "D", "-", pictures.TANGENT),
    }
    ends = []
    for kind, (words, colour) in levels.items():
        score = results.of(kind)[0].percent
        pictures.draw_level(axes, score, colour=colour)
        ends.append((score, f"{score:.1f}  {words}", colour))
    for kind, look in lines.items():
        rows = results.of(kind)
        numbers, scores = [row.shards for row in rows], [row.percent for row in rows]
        axes.plot(numbers, scores, linewidth=2.5, **look.drawn)
        ends.append((scores[-1], f"{scores[-1]:.1f}  {look.title}", look.colour))
    axes.set_ylabel(results.scored + " images recognised, %")
    axes.set_xlabel("shards that the same images are dealt into")
    axes.margins(y=0.09)
    pictures.number_axis(axes, numbers)
    axes.set_title("Statistics add up, however the images are dealt")
    for number, score in zip(numbers[:-1], scores[:-1], strict=True):  # of the means
        axes.annotate(f"{score:.1f}", (number, score), color=pictures.TANGENT, **ABOVE)
    pictures.label_ends(axes, ends)


def _times(axes: Axes, results: Results) -> None:
    """Seconds to forget: by training again, and by a ledger of statistics and a solve."""
    again = results.of("ordinary")[0].seconds
    axes.barh("train again:\nordinary fine-tuning", again, color=pictures.ORDINARY, height=0.5)
    axes.annotate(duration(again), (again, 0), **BESIDE)
    for place, (kind, what) in enumerate({"image": "one image", "shard": "a shard"}.items(), 1):
        row = results.of(f"no {kind}")[0]
        end = row.seconds + row.solve
        axes.barh(f"statistics:\n{what}", end, color=pictures.EXACT, height=0.5)
        times = f"{duration(row.seconds)} to forget, {duration(row.solve)} to solve"
        axes.annotate(f"{times}\n{row.percent:.1f} % afterwards", (end, place), **BESIDE)
    axes.set_xlim(0, 1.25 * max(again, end))
    axes.grid(visible=False)
    axes.invert_yaxis()
    axes.set_xlabel("seconds to forget")
    axes.set_title("Forgotten bit for bit")
