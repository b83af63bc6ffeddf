"""Pictures of a result: time and memory against the number of tokens, roofline, whole models."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator

from benchmarks.stored import Result, Row, ratio
from benchmarks.units import amount, digits, duration

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
DIRECTIONS = {
    "attention-forward": "forward with tangent",
    "attention-backward": "backward of the tangent",
    "attention-second-order": "backward of both",
}
MODELS = {"model-forward": ("Forward pass", 3.0), "train-step": ("Training step", 5 / 3)}
MARKERS = {  # of the roofline
    "attention-forward": ("o", "circles"),
    "attention-backward": ("s", "squares"),
    "attention-second-order": ("D", "diamonds"),
    "linear": ("^", "triangles"),
}


def draw_all(result: Result, out: Path) -> list[Path]:
    """Draws every picture that the result has data for; the files begin with the device's name."""
    with plt.rc_context(STYLE):
        time = _against_tokens(result, out, "time", lambda row: row.seconds, duration)
        memory = _against_tokens(result, out, "peak memory", lambda row: row.peak_bytes, amount)
        return [*time, *memory, *_rooflines(result, out), *_models(result, out)]


# --- attention against the number of tokens ------------------------------------------------------

Lines = dict[str, dict[int, float]]  # value by provider and number of tokens


def _against_tokens(
    result: Result,
    out: Path,
    what: str,
    figure_of: Callable[[Row], float | None],
    words: Callable[[float], str],
) -> list[Path]:
    """One picture per dtype, causal and head dimension that has two lengths or more."""
    drawn = []
    for (dtype, causal, depth), directions in _series(result, figure_of).items():
        figure, axes = _panels(len(directions))
        for axis, (group, lines) in zip(axes, directions.items(), strict=True):
            for provider, points in lines.items():
                tokens, values = zip(*sorted(points.items()), strict=True)
                axis.plot(tokens, values, color=colour(provider), **_line_style(provider))
            lengths = sorted({n for points in lines.values() for n in points})
            values = [value for points in lines.values() for value in points.values()]
            steps = (1, 2, 5) if max(values) < 100 * min(values) else (1,)
            axis.set(xscale="log", yscale="log", title=DIRECTIONS[group], xlabel="tokens N")
            axis.set_xticks(lengths, [str(n) for n in lengths], rotation=90, fontsize=8)
            axis.yaxis.set_major_locator(LogLocator(subs=steps))
            axis.yaxis.set_major_formatter(lambda value, _: re.sub(r"\.0+ ", " ", words(value)))
            axis.minorticks_off()
            axis.grid(True)
        label = f"{what} per image and head"
        axes[0].set_ylabel(label)
        shown = dict.fromkeys(name for lines in directions.values() for name in lines)
        keys = [Line2D([], [], color=colour(one), label=one, **_line_style(one)) for one in shown]
        kind = " causal" if causal else ""
        title = f"Attention, {dtype}, D = {depth},{kind}: {label}".replace(",:", ":")
        note = "Dashed: PyTorch's attention without a tangent."
        name = f"{result.device}-{what.split()[-1]}-{dtype}-d{depth}{'-causal' if causal else ''}"
        drawn.append(_save(figure, out / f"{name}.png", title, keys, result, note))
    return drawn


def _series(
    result: Result, figure_of: Callable[[Row], float | None]
) -> dict[tuple[str, bool, int], dict[str, Lines]]:
    """Values per image and head, by (dtype, causal, D), direction, provider and tokens.

    Of several batches or heads with as many tokens, the first measured counts.
    """
    found: dict[tuple[str, bool, int], dict[str, Lines]] = {}
    for row in result.rows:
        value = figure_of(row) if row.case.group in DIRECTIONS else None
        if value:  # 0 has no logarithm
            batch, heads, tokens, depth = row.case.shape
            directions = found.setdefault((row.case.dtype, row.case.causal, depth), {})
            points = directions.setdefault(row.case.group, {}).setdefault(row.provider, {})
            points.setdefault(tokens, value / (batch * heads))
    for key, directions in found.items():
        found[key] = {
            group: lines
            for group, lines in directions.items()
            if len({n for points in lines.values() for n in points}) >= 2
        }
    return {key: directions for key, directions in found.items() if directions}


# --- roofline ------------------------------------------------------------------------------------


def _rooflines(result: Result, out: Path) -> list[Path]:
    """One picture per dtype whose limits are known: attention and linear, every provider."""
    drawn = []
    bandwidth = result.ceilings.get("bytes/s")
    rates = {n.split()[1]: rate for n, rate in result.ceilings.items() if n.startswith("flops/s ")}
    for dtype, rate in rates.items():
        rows = [one for one in result.rows if one.case.dtype == dtype and one.case.group in MARKERS]
        rows = [row for row in rows if row.seconds and row.flops and row.bytes]
        if not rows or bandwidth is None:
            continue
        figure, (axis,) = _panels(1, width=7.5, height=4.6)
        for row in rows:
            style: Any = {"color": colour(row.provider), "marker": MARKERS[row.case.group][0]}
            point = row.flops / row.bytes, row.flops / (row.seconds or 1.0)
            axis.scatter(*point, s=22, alpha=0.8, linewidths=0, **style)
        ridge = rate / bandwidth
        reach = [row.flops / row.bytes for row in rows] + [ridge]
        ends = (min(reach) / 2, max(reach) * 3)
        roof = [min(rate, bandwidth * x) for x in (ends[0], ridge, ends[1])]
        axis.plot([ends[0], ridge, ends[1]], roof, color="#444444", linewidth=1.2)
        options: Any = {"textcoords": "offset points", "fontsize": 8}
        words = f"matmul, {digits(rate / 1e12)} TFLOP/s"
        axis.annotate(words, (ends[1], rate), (0, 4), ha="right", **options)
        words = f"copy, {digits(bandwidth / 1e9)} GB/s"
        axis.annotate(words, (ends[0], bandwidth * ends[0]), (6, -10), **options)
        axis.set(xscale="log", yscale="log", ylabel="FLOP/s", xlim=ends)
        axis.set_xlabel("arithmetic intensity: least FLOPs / least bytes")
        axis.grid(True)
        keys = [
            Line2D([], [], color=colour(one), label=one, linestyle="", marker="o")
            for one in dict.fromkeys(row.provider for row in rows)
        ]
        groups = dict.fromkeys(row.case.group for row in rows)
        note = "; ".join(f"{MARKERS[group][1]}: {group}" for group in groups)
        path = out / f"{result.device}-roofline-{dtype}.png"
        drawn.append(_save(figure, path, f"Roofline, {dtype}", keys, result, note))
    return drawn


# --- whole models --------------------------------------------------------------------------------


def _models(result: Result, out: Path) -> list[Path]:
    """Time and memory over fine-tuning's: a picture per question, dtype and batch."""
    drawn = []
    cases = {c: a for c, a in result.by_case().items() if c.group in MODELS}
    for group, dtype, batch in dict.fromkeys((c.group, c.dtype, c.shape[0]) for c in cases):
        panels: dict[str, dict[str, dict[str, float]]] = {}
        for case, answers in cases.items():
            if (case.group, case.dtype, case.shape[0]) != (group, dtype, batch):
                continue
            for title, of in (("time", "seconds"), ("peak memory", "peak_bytes")):
                ratios = {
                    name: ratio(row, answers.get("finetune"), of) for name, row in answers.items()
                }
                known = {name: value for name, value in ratios.items() if value is not None}
                if known:
                    label = case.op.removesuffix("_patch16_224")
                    panels.setdefault(title, {})[label] = known
        if not panels:
            continue
        words, bound = MODELS[group]
        figure, axes = _panels(len(panels), width=4.6)
        for axis, (title, bars) in zip(axes, panels.items(), strict=True):
            _draw_bars(axis, bars)
            axis.set(title=title)
            if title == "time":
                axis.axhline(bound, color="#444444", linewidth=1, linestyle=":")
        axes[0].set_ylabel("times fine-tuning")
        shown = dict.fromkeys(n for bars in panels.values() for one in bars.values() for n in one)
        keys = [
            Patch(facecolor=colour(one), hatch=_hatch(one), edgecolor="white", label=one)
            for one in shown
        ]
        title = f"{words}, whole models, {dtype}, batch {batch}"
        note = "Over ordinary fine-tuning. Dotted: the bound by counting products, 3 or 5/3."
        path = out / f"{result.device}-{group}-{dtype}-b{batch}.png"
        drawn.append(_save(figure, path, title, keys, result, note))
    return drawn


def _draw_bars(axis: Any, bars: dict[str, dict[str, float]]) -> None:
    """A group of bars per label, with their heights written above."""
    highest = max(height for group in bars.values() for height in group.values())
    for index, group in enumerate(bars.values()):
        width = 0.8 / len(group)
        for position, (provider, height) in enumerate(group.items()):
            x = index - 0.4 + width * (position + 0.5)
            style: Any = {"color": colour(provider), "hatch": _hatch(provider), "ec": "white"}
            axis.bar(x, height, 0.9 * width, lw=0, **style)
            words = f" {height:.2f}"
            axis.text(x, height, words, ha="center", va="bottom", fontsize=6.5, rotation=90)
    axis.set_xticks(range(len(bars)), list(bars))
    axis.axhline(1, color="#444444", linewidth=0.8)
    axis.set_ylim(0, 1.25 * highest)
    axis.grid(True, axis="y")


# --- how pictures look ---------------------------------------------------------------------------


def colour(provider: str) -> str:
    """A provider's, in every picture; a compiled one has that of its original."""
    return COLOURS.get(provider.removesuffix(COMPILED), UNKNOWN)


def _hatch(provider: str) -> str:
    """Of a bar: compiled ones are striped."""
    return "///" if provider.endswith(COMPILED) else ""


def _line_style(provider: str) -> dict[str, Any]:
    """Plain attention is dashed, ours is bold."""
    if provider.startswith("sdpa-"):
        return {"linestyle": "--", "linewidth": 1.2, "marker": "s", "markersize": 3.5}
    width = 2.4 if provider == "ours" else 1.5
    return {"linestyle": "-", "linewidth": width, "marker": "o", "markersize": 4.5}


def _panels(count: int, width: float = 3.6, height: float = 3.4) -> tuple[Figure, Any]:
    """A figure with panels in a row, each of that many inches."""
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), squeeze=False)
    return figure, axes[0]


def _save(
    figure: Figure, path: Path, title: str, keys: Iterable[Any], result: Result, note: str
) -> Path:
    """Writes the picture with the key above and the conditions in small print below."""
    keys, columns = list(keys), max(1, int(figure.get_figwidth() // 1.4))
    options: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False}
    figure.legend(handles=keys, ncols=columns, **options)
    figure.tight_layout()
    top = 1.0 + (0.28 + 0.19 * -(-len(keys) // columns)) / figure.get_figheight()
    figure.text(0.5, top, title, ha="center", va="bottom", fontsize=11, weight="bold")
    width = int(figure.get_figwidth() * 17)  # characters of the small print
    lines = textwrap.wrap(note, width) + textwrap.wrap(result.conditions, width)
    small: Any = {"ha": "center", "va": "top", "fontsize": 7, "color": "#555555"}
    figure.text(0.5, -0.1 / figure.get_figheight(), "\n".join(lines), **small)
    figure.savefig(path, format="png", dpi=150, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)
    return path
