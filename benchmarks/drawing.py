"""How pictures look: a provider's colour, the small print, the file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.stored import conditions
from benchmarks.suite.row import Result

# Okabe and Ito's, which the colour-blind tell apart, too; plain attention is grey to black.
COLOURS = {
    "ours": "#D55E00",
    "taft-all": "#D55E00",
    "taft-1": "#009E73",
    "taft-1-cached": "#CC79A7",
    "torch-jvp": "#0072B2",
    "compiled": "#009E73",
    "jvp-flash-attention": "#CC79A7",
    "finite-differences": "#E69F00",
    "sdpa-flash": "#000000",
    "sdpa-efficient": "#56B4E9",
    "sdpa-cudnn": "#777777",
    "sdpa-math": "#AAAAAA",
    "plain": "#882255",
    "finetune": "#000000",
    "finetune-1": "#777777",
}
UNKNOWN = "#B0A000"
COMPILED = "-compiled"
DPI = 150
STYLE: Any = {  # matplotlib types its keys
    "figure.facecolor": "white",  # readable on a dark page, too
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "font.size": 9,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
}


def colour(provider: str) -> str:
    """A provider's, in every picture; a compiled one has that of its original."""
    return COLOURS.get(provider.removesuffix(COMPILED), UNKNOWN)


def hatch(provider: str) -> str:
    """Of a bar: compiled ones are striped."""
    return "///" if provider.endswith(COMPILED) else ""


def line_style(provider: str) -> dict[str, Any]:
    """Yardsticks are dashed, ours is bold."""
    if provider.startswith("sdpa-"):
        return {"linestyle": "--", "linewidth": 1.2, "marker": "s", "markersize": 3.5}
    width = 2.4 if provider == "ours" else 1.5
    return {"linestyle": "-", "linewidth": width, "marker": "o", "markersize": 4.5}


def side_by_side(panels: int, width: float = 3.6, height: float = 3.4) -> tuple[Figure, Any]:
    """A figure with panels in a row, each of that many inches."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, panels, figsize=(width * panels, height), squeeze=False)
    return figure, axes[0]


def stacked(panels: int, width: float = 8.5, height: float = 2.5) -> tuple[Figure, Any]:
    """A figure with panels in a column, each of that many inches."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(panels, 1, figsize=(width, height * panels), squeeze=False)
    return figure, axes[:, 0]


def legend(figure: Figure, providers: Iterable[str], line: bool = True) -> None:
    """The key of lines, or of points, above all panels."""
    dots = {"linestyle": "", "marker": "o", "markersize": 6}
    styles = {name: line_style(name) if line else dots for name in providers}
    keys = [Line2D([], [], color=colour(name), label=name, **styles[name]) for name in styles]
    _place_legend(figure, keys)


def bar_legend(figure: Figure, providers: Iterable[str]) -> None:
    """The key of bars, above all panels."""
    keys = [
        Patch(facecolor=colour(p), hatch=hatch(p), edgecolor="white", label=p) for p in providers
    ]
    _place_legend(figure, keys)


def _place_legend(figure: Figure, keys: list[Any]) -> None:
    figure.legend(
        handles=keys,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=_columns(figure),
        frameon=False,
    )


def _columns(figure: Figure) -> int:
    return max(1, int(figure.get_figwidth() // 1.6))


def save(figure: Figure, path: Path, title: str, result: Result, note: str = "") -> Path:
    """Writes the picture, whole or not at all, with the conditions in small print under it."""
    with plt.rc_context(STYLE):
        figure.tight_layout()
        rows = -(-len(figure.legends[0].get_texts()) // _columns(figure))
        top = 1.0 + (0.28 + 0.19 * rows) / figure.get_figheight()
        figure.text(0.5, top, title, ha="center", va="bottom", fontsize=11, weight="bold")
        width = int(figure.get_figwidth() * 17)  # characters of the small print
        lines = textwrap.wrap(note, width) + textwrap.wrap(conditions(result), width)
        place = (0.5, -0.1 / figure.get_figheight())
        figure.text(*place, "\n".join(lines), ha="center", va="top", fontsize=7, color="#555555")
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15)
        plt.close(figure)
    partial.replace(path)
    return path
