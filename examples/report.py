"""What the demo shows: a table in the terminal, a chart, and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from setting import Settings
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """What rows of one kind have in common: their mark in the chart and what they are."""

    marker: str
    colour: str
    meaning: str


# Okabe and Ito's colours, told apart by colour-blind readers; the shapes serve black and white.
KINDS = {
    "anchor": Kind("o", "#000000", "Linear head on the frozen model. Where all below start."),
    "probe": Kind("o", "#000000", "Linear head on the frozen model."),
    "ordinary": Kind("s", "#D55E00", "Last block, norm and head fine-tuned as usual."),
    "tangent": Kind("D", "#0072B2", "The same parameters, of the model's linear expansion."),
    "shard": Kind("|", "#0072B2", "The same, trained on one shard only."),
    "composed": Kind("P", "#0072B2", "The mean of the shards' deltas, read from their files."),
    "forgotten": Kind("X", "#CC79A7", "What is left without a shard."),
    "exact": Kind("^", "#009E73", "The optimum of a quadratic loss with a penalty."),
    "lossless": Kind("*", "#009E73", "Shards' optima, joined by their curvatures."),
}


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        name: What to call it.
        kind: What it is.
        images: Training images it has seen, those of its anchor's head included.
        accuracy: On the scored images, 0 to 1.
        seconds: To get it from what the rows above made.
    """

    name: str
    kind: Kind
    images: int
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Sample:
    """A training image of the forgotten shard, and what two compositions take it for."""

    image: Tensor  # (3, height, width), normalised
    before: str  # right
    after: str  # wrong


@dataclass
class Results:
    """Everything that is shown.

    Attributes:
        data: Name of the image set.
        model: Name of the backbone.
        settings: The options.
        public: Number of public training images.
        private: Number of images in each shard.
        scored: Number of images that accuracy and loss are measured on.
        rows: The models.
        exact: The models of the exact part.
        influence: The training images that helped and harmed a prediction most.
        facts: What linearity promises, as measured.
        own_loss: Change of the loss on each shard's own training images when it is forgotten.
        other_loss: The same on the scored images, which are in no shard.
        samples: Images of the forgotten shard that were recognised and no longer are.
        delta_bytes: Size of one delta file.
        seconds: Time of everything, downloads not included.
    """

    data: str
    model: str
    settings: Settings
    public: int
    private: int
    scored: int
    rows: list[Row] = field(default_factory=list)
    exact: list[Row] = field(default_factory=list)
    influence: Figure | None = None
    facts: list[str] = field(default_factory=list)
    own_loss: list[float] = field(default_factory=list)
    other_loss: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    delta_bytes: int = 0
    seconds: float = 0.0

    def add(self, kind: str, name: str, images: int, accuracy: float, seconds: float) -> None:
        """Append a row; `kind` is a key of `KINDS`."""
        self.rows.append(Row(name, KINDS[kind], images, accuracy, seconds))

    def add_exact(self, kind: str, name: str, images: int, accuracy: float, seconds: float) -> None:
        """Append a row of the exact part."""
        self.exact.append(Row(name, KINDS[kind], images, accuracy, seconds))

    def accuracy_of(self, kind: str) -> float:
        """Of the first row of that kind, 0 to 1."""
        return next(row.accuracy for row in self.rows if row.kind is KINDS[kind])

    @property
    def standard_error(self) -> float:
        """Of the composition's accuracy, in points: sqrt(p (1 - p) / n)."""
        p = self.accuracy_of("composed")
        return 100 * (p * (1 - p) / self.scored) ** 0.5

    @property
    def setting(self) -> str:
        """One line: data, parts, scoring."""
        return (
            f"{self.data}: {self.public} public images, {self.settings.shards} shards of "
            f"{self.private}, {self.scored} {self.settings.score_on} images "
            f"(standard error about {self.standard_error:.1f} points)"
        )


def print_table(results: Results, console: Console) -> None:
    """Print the models, then the facts."""
    apart = [KINDS[name] for name in ("shard", "composed", "forgotten")]
    table = Table(title=f"\n{results.model}, last block trained", caption=results.setting)
    table.add_column("model")
    table.add_column("training images", justify="right")
    table.add_column("accuracy", justify="right")
    table.add_column("seconds", justify="right")
    rows = [*results.rows, *results.exact]
    for previous, row in zip([None, *rows], rows, strict=False):
        first_exact = bool(results.exact) and row is results.exact[0]
        if previous and row.kind is not previous.kind and (row.kind in apart or first_exact):
            table.add_section()
        style = "bold" if row.kind in apart[1:] else ""
        cells = (f"{row.images:,}", f"{100 * row.accuracy:.1f} %", f"{row.seconds:.1f}")
        table.add_row(row.name, *cells, style=style)
    console.print(table)
    for fact in results.facts:
        console.print(f"  [green]✓[/green] {fact}")


def write_report(results: Results) -> list[Path]:
    """Write ``chart.png``, ``report.html`` and ``results.json`` to the output folder.

    Returns:
        Their paths.
    """
    out = results.settings.out
    chart = png(draw_chart(results))
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = templates.get_template("report.html.j2").render(
        results=results,
        chart=base64.b64encode(chart).decode(),
        influence=results.influence and base64.b64encode(png(results.influence)).decode(),
        samples=[
            (sample, base64.b64encode(png(thumbnail(sample))).decode())
            for sample in results.samples
        ],
    )
    numbers = json.dumps(as_json(results), indent=2) + "\n"
    paths = [out / "chart.png", out / "report.html", out / "results.json"]
    paths[0].write_bytes(chart)
    paths[1].write_text(page, encoding="utf-8")
    paths[2].write_text(numbers, encoding="utf-8")
    if results.influence is not None:
        paths.append(out / "influence.png")
        paths[-1].write_bytes(png(results.influence))
    return paths


def as_json(results: Results) -> dict[str, object]:
    """The numbers of a run, and what they depend on; accuracies from 0 to 1, times in seconds."""
    return {
        "model": results.model,
        "setting": results.setting,
        "seed": results.settings.seed,
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seconds": results.seconds,
        "rows": [_numbers(row) for row in results.rows],
        "exact": [_numbers(row) for row in results.exact],
        "facts": results.facts,
    }


def _numbers(row: Row) -> dict[str, object]:
    return {
        "kind": next(name for name, kind in KINDS.items() if kind is row.kind),
        "name": row.name,
        "images": row.images,
        "accuracy": row.accuracy,
        "seconds": row.seconds,
    }


def draw_chart(results: Results) -> Figure:
    """Accuracy of every model, and what the composition remembers of each shard."""
    with matplotlib.rc_context(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(12, 5), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
        _accuracies(left, results)
        _memories(right, results)
    return figure


def _accuracies(axes: Axes, results: Results) -> None:
    rows = results.rows
    for place, row in enumerate(rows):
        axes.plot(
            100 * row.accuracy,
            place,
            row.kind.marker,
            color=row.kind.colour,
            markersize=9,
            markeredgewidth=2,
        )
        axes.annotate(
            f"{100 * row.accuracy:.1f}",
            (100 * row.accuracy, place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    low, high = (100 * pick(row.accuracy for row in rows) for pick in (min, max))
    axes.set_xlim(low - 0.08 * (high - low) - 0.5, high + 0.16 * (high - low) + 0.5)
    axes.set_xlabel(f"accuracy on {results.scored} {results.settings.score_on} images, %")
    axes.set_title("Trained on everything, or in shards", loc="left")


def _memories(axes: Axes, results: Results) -> None:
    places = range(1, len(results.own_loss) + 1)
    width = 0.38
    style = {"width": width, "edgecolor": "black", "linewidth": 0.8}
    axes.bar(
        [place - width / 2 for place in places],
        results.own_loss,
        color=KINDS["forgotten"].colour,
        hatch="///",
        label="images of that shard",
        **style,
    )
    axes.bar(
        [place + width / 2 for place in places],
        results.other_loss,
        color="white",
        label=f"{results.settings.score_on} images",
        **style,
    )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(places)
    axes.set_xlabel("shard forgotten")
    axes.set_ylabel("change of the mean model's loss")
    axes.set_title("A shard forgotten: what its own images lose", loc="left")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def thumbnail(sample: Sample) -> Figure:
    """The sample's image, its contrast stretched."""
    image = sample.image - sample.image.min()
    figure = Figure(figsize=(1, 1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow((image / image.max().clamp_min(1e-6)).permute(1, 2, 0).numpy())
    axes.set_axis_off()
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
