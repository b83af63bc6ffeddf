"""How every picture looks: fonts, colours, grid, legends, labels, sizes, and how it is saved.

Colours are those of Okabe and Ito (2008), told apart by colour-blind readers. One thing has one
colour in every picture; where several ways share a colour, marker and line tell them apart.
Needs matplotlib (extra ``plots``), which is imported when something is drawn.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tangent_ops.errors import UnsupportedError
from tangent_ops.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, SKY, GREEN, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#CC79A7"
ORANGE, AMBER, BLACK, GREY = "#D55E00", "#E69F00", "#000000", "#595959"

TANGENT, TANGENT_OTHER = BLUE, SKY  # tangent fine-tuning (TAFT), and another form of it
EXACT = GREEN  # what is solved from sums: statistics, exact fits, exact influence
ORDINARY, ORDINARY_OTHER = ORANGE, AMBER  # ordinary fine-tuning (NLFT), attention without tangents
ORDINARIES = (ORDINARY, ORDINARY_OTHER)
RIVAL = PURPLE  # another way to what this library computes
PROBE = BLACK  # a head trained alone
LEVEL = GREY  # what depends on nothing that the picture varies: anchors, chance, bounds

# Of words in these colours, which are too light for text: a contrast of 4.5 with white or more.
INKS = {SKY: "#1F78A8", AMBER: "#8F6300", GREEN: "#007A59", ORANGE: "#B84F00", PURPLE: "#A9497F"}

WIDTH = 9.0  # inches of a picture that fills a page; there its text has the size of the page's
RESOLUTION = 160  # pixels per inch
SMALL = 8.5  # points of notes and of numbers beside bars and points
TERMS = "TAFT: tangent fine-tuning. NLFT: non-linear fine-tuning, the ordinary one."

STYLE: Any = {  # matplotlib types its keys
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.xmargin": 0.05,
    "axes.ymargin": 0.08,
    "errorbar.capsize": 2.5,
    "figure.facecolor": "white",  # readable on a dark page, too
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 10,
    "grid.color": "#E2E2E2",
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markeredgewidth": 1.3,
    "lines.markersize": 6,
    "savefig.dpi": RESOLUTION,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


@dataclass(frozen=True)
class Look:
    """How one series is drawn.

    Attributes:
        title: What it is, in words.
        marker: matplotlib's name of the marker.
        line: matplotlib's line style.
        colour: One of this module.
    """

    title: str
    marker: str
    line: Any
    colour: str

    @property
    def drawn(self) -> dict[str, Any]:
        """As keywords of ``plot`` and ``errorbar``; markers are hollow."""
        return {
            "marker": self.marker,
            "linestyle": self.line,
            "color": self.colour,
            "markerfacecolor": "white",
        }


@contextmanager
def styled() -> Iterator[None]:
    """The style of what is drawn inside; also a decorator, ``@styled()``.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError(
            "pictures need matplotlib: pip install 'tangent-ops[plots]', or pip install matplotlib"
        ) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own settings would give other pictures
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(width: float = WIDTH, height: float = 4.0) -> Figure:
    """An empty figure of that many inches, drawn without a window; inside `styled`."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.05)  # inches
    return Figure(figsize=(width, height), layout=layout)


def number_axis(axes: Axes, numbers: Sequence[float], space: float = 0.035) -> None:
    """A logarithmic x axis with ticks at these numbers alone, written out: 1, 10, 1,000.

    A number nearer to the one before than `space`, a part of the axis, gets a tick without a text.
    """
    axes.set_xscale("log")
    low, high = math.log(min(numbers)), math.log(max(numbers))
    margin = 0.05 * (high - low or 1.0)
    axes.set_xlim(math.exp(low - margin), math.exp(high + margin))
    texts, last = [], -math.inf
    for number in numbers:
        place = math.log(number)
        words = f"{number:,.0f}" if number >= 1000 else f"{number:g}"
        free = place - last >= space * len(words) * (high - low)
        texts.append(words if free else "")
        last = place if free else last
    axes.set_xticks(numbers, texts)
    axes.minorticks_off()


def draw_level(
    axes: Axes, value: float, label: str | None = None, line: Any = (0, (1, 2)), colour: str = LEVEL
) -> None:
    """A value that depends on nothing here, as a line from left to right."""
    axes.axhline(value, color=colour, linewidth=1.2, linestyle=line, zorder=1.5, label=label)


def label_ends(axes: Axes, ends: Iterable[tuple[float, str, str]], size: float = 9) -> None:
    """Write what each line is to the right of the axes, at its end; labels do not touch.

    Call it last: limits of axes, notes and legends decide how much room there is.

    Args:
        axes: with lines that end at the right.
        ends: of each line its last value, its label and its colour.
        size: points.
    """
    figure: Any = axes.get_figure()
    figure.draw_without_rendering()  # places the axes
    gap = 1.4 * size / (axes.get_position().height * figure.get_figheight() * 72)
    ordered = sorted(ends)
    to_axes = axes.transScale + axes.transLimits
    places = [float(to_axes.transform((1, value))[1]) for value, _, _ in ordered]
    for place, (_, words, colour) in zip(spread(places, gap), ordered, strict=True):
        axes.annotate(
            words, (1, place), xycoords="axes fraction", xytext=(7, 0), annotation_clip=False,
            textcoords="offset points", color=INKS.get(colour, colour), va="center", fontsize=size,
        )  # fmt: skip


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


def legend_above(
    figure: Figure, columns: int, keys: Mapping[str, Any] | None = None, title: str | None = None
) -> None:
    """One legend for all axes, above them, below the picture's title.

    Args:
        figure: with axes.
        columns: of the legend.
        keys: label to handle; None for those of the axes.
        title: of the picture.
    """
    if keys is None:
        keys = {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    options: Any = {"title": title, "title_fontproperties": {"size": 11.5, "weight": "bold"}}
    options |= {"alignment": "left", "ncols": columns, "borderpad": 0}
    figure.legend(keys.values(), keys, loc="outside upper left", **options)


def note(figure: Figure, words: str) -> None:
    """Small print below a picture, in as many lines as its width asks for."""
    width = int(figure.get_figwidth() * 15.5)  # characters
    lines = [part for line in words.split("\n") for part in textwrap.wrap(line, width)]
    figure.supxlabel("\n".join(lines), fontsize=SMALL, color=GREY, x=0.01, ha="left")


@styled()
def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a PNG, whole or not at all; a figure that is made anew gives the same bytes."""
    path, content = Path(path), io.BytesIO()
    figure.savefig(content, format="png", dpi=RESOLUTION, metadata={"Software": None})

    def write(file: BinaryIO) -> None:
        file.write(content.getvalue())

    write_atomically(path, write)
    return path
