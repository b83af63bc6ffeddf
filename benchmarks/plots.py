"""Pictures of a result: time and memory against the number of tokens, roofline, whole models."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Container
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.report import digits, si
from benchmarks.stored import Result, ratio

# Of Okabe and Ito, which colour-blind people tell apart, too; the last three are greys.
COLOURS = "D55E00 0072B2 009E73 CC79A7 E69F00 56B4E9 882255 000000 777777 AAAAAA".split()  # noqa: SIM905
STYLE: Any = {  # matplotlib types its keys
    "figure.facecolor": "white",  # readable on a dark page, too
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "font.size": 9,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "axes.grid": True,
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
        time = _against_tokens(result, out, "time", "seconds", "s")
        memory = _against_tokens(result, out, "peak memory", "peak_bytes", "B")
        return [*time, *memory, *_rooflines(result, out), *_models(result, out)]


def colours_of(result: Result, groups: Container[str]) -> dict[str, str]:
    """A colour per provider of these groups, in their order; compiled ones come last."""
    names = dict.fromkeys(row.provider for row in result.rows if row.case.group in groups)
    ordered = sorted(names, key=lambda name: name.endswith("-compiled"))
    return {name: f"#{colour}" for name, colour in zip(ordered, itertools.cycle(COLOURS))}


# --- attention against the number of tokens ------------------------------------------------------


def _against_tokens(result: Result, out: Path, what: str, of: str, unit: str) -> list[Path]:
    """One picture per dtype, causal and head dimension that has two lengths or more.

    Values are per image and head. Of several batches or heads with as many tokens, the first
    measured counts.
    """
    series: dict[tuple, dict[str, dict[str, dict[int, float]]]] = {}
    for row in result.rows:
        value = getattr(row, of) if row.case.group in DIRECTIONS else None
        if value:  # 0 has no logarithm
            batch, heads, tokens, depth = row.case.shape
            directions = series.setdefault((row.case.dtype, row.case.causal, depth), {})
            points = directions.setdefault(row.case.group, {}).setdefault(row.provider, {})
            points.setdefault(tokens, value / (batch * heads))
    drawn, colours = [], colours_of(result, DIRECTIONS)
    for (dtype, causal, depth), directions in series.items():
        lengths = sorted(
            {n for lines in directions.values() for one in lines.values() for n in one}
        )
        if len(lengths) < 2:
            continue
        figure, axes = _panels(len(directions))
        for axis, (group, lines) in zip(axes, directions.items(), strict=True):
            for name, points in lines.items():
                style = "s--" if name.startswith("sdpa-") else "o-"
                pairs = zip(*sorted(points.items()), strict=True)
                axis.plot(*pairs, style, ms=4, color=colours[name], label=name)
            axis.set(xscale="log", yscale="log", title=DIRECTIONS[group], xlabel="tokens N")
            axis.set_xticks(lengths, [str(n) for n in lengths], rotation=90, fontsize=8)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda y, _: re.sub(r"\.0+ ", " ", si(y, unit)))
            axis.minorticks_off()
        axes[0].set_ylabel(f"{what} per image and head")
        kind = ", causal" if causal else ""
        title = f"Attention, {dtype}, D = {depth}{kind}: {what} per image and head"
        note = "Dashed: PyTorch's attention without a tangent."
        name = f"{what.split()[-1]}-{dtype}-d{depth}{'-causal' if causal else ''}"
        drawn.append(_save(figure, out, name, title, result, note))
    return drawn


# --- roofline ------------------------------------------------------------------------------------


def _rooflines(result: Result, out: Path) -> list[Path]:
    """One picture per dtype whose limits are known: attention and linear, every provider."""
    drawn, colours = [], colours_of(result, MARKERS)
    bandwidth = result.ceilings.get("bytes/s")
    rates = {n.split()[1]: rate for n, rate in result.ceilings.items() if n.startswith("flops/s ")}
    for dtype, rate in rates.items():
        rows = [one for one in result.rows if one.case.dtype == dtype and one.case.group in MARKERS]
        rows = [row for row in rows if row.seconds and row.flops and row.bytes]
        if not rows or bandwidth is None:
            continue
        figure, (axis,) = _panels(1, width=7.5, height=5.4)
        for row in rows:
            style: Any = {"color": colours[row.provider], "label": row.provider, "lw": 0}
            point = row.flops / row.bytes, row.flops / (row.seconds or 1.0)
            axis.plot(*point, MARKERS[row.case.group][0], ms=5, alpha=0.8, **style)
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
        groups = dict.fromkeys(row.case.group for row in rows)
        note = "; ".join(f"{MARKERS[group][1]}: {group}" for group in groups)
        drawn.append(_save(figure, out, f"roofline-{dtype}", f"Roofline, {dtype}", result, note))
    return drawn


# --- whole models --------------------------------------------------------------------------------


def _models(result: Result, out: Path) -> list[Path]:
    """Time and memory over fine-tuning's: a picture per question, dtype and batch."""
    drawn, colours = [], colours_of(result, MODELS)
    cases = {c: a for c, a in result.by_case().items() if c.group in MODELS}
    for group, dtype, batch in dict.fromkeys((c.group, c.dtype, c.shape[0]) for c in cases):
        chosen = {
            case.op.removesuffix("_patch16_224"): answers
            for case, answers in cases.items()
            if (case.group, case.dtype, case.shape[0]) == (group, dtype, batch)
        }
        panels = {"time": "seconds", "peak memory": "peak_bytes"}
        bars = {
            title: {
                (model, name): times
                for model, answers in chosen.items()
                for name, row in answers.items()
                if (times := ratio(row, answers.get("finetune"), of)) is not None
            }
            for title, of in panels.items()
        }
        bars = {title: heights for title, heights in bars.items() if heights}
        if not bars:
            continue
        words, bound = MODELS[group]
        figure, axes = _panels(len(bars), width=4.6)
        for axis, (title, heights) in zip(axes, bars.items(), strict=True):
            _draw_bars(axis, list(chosen), heights, colours)
            axis.set(title=title)
            if title == "time":
                axis.axhline(bound, color="#444444", linewidth=1, linestyle=":")
        axes[0].set_ylabel("times fine-tuning")
        title = f"{words}, whole models, {dtype}, batch {batch}"
        note = "Over ordinary fine-tuning. Dotted: the bound by counting products, 3 or 5/3."
        drawn.append(_save(figure, out, f"{group}-{dtype}-b{batch}", title, result, note))
    return drawn


def _draw_bars(
    axis: Any, models: list[str], heights: dict[tuple[str, str], float], colours: dict[str, str]
) -> None:
    """A group of bars per model, a bar per provider, with their heights written above."""
    names = [name for name in colours if any((model, name) in heights for model in models)]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        known = [index for index, model in enumerate(models) if (model, name) in heights]
        x = [index - 0.4 + width * (place + 0.5) for index in known]
        y = [heights[models[index], name] for index in known]
        bars = axis.bar(x, y, 0.9 * width, color=colours[name], label=name)
        axis.bar_label(bars, fmt=" %.2f", rotation=90, fontsize=6.5)
    axis.set_xticks(range(len(models)), models)
    axis.axhline(1, color="#444444", linewidth=0.8)
    axis.margins(y=0.25)
    axis.grid(visible=False, axis="x")


# --- how pictures look ---------------------------------------------------------------------------


def _panels(count: int, width: float = 3.6, height: float = 4.2) -> tuple[Figure, Any]:
    """A figure with panels in a row, each of that many inches."""
    size = (width * count, height)
    figure, axes = plt.subplots(1, count, figsize=size, squeeze=False, layout="constrained")
    return figure, axes[0]


def _save(figure: Figure, out: Path, name: str, title: str, result: Result, note: str) -> Path:
    """Writes the picture with the key above and the conditions in small print below."""
    keys = {
        label: handle
        for axis in figure.axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    options: Any = {"title": title, "title_fontproperties": {"size": 11, "weight": "bold"}}
    options["ncols"] = max(1, int(figure.get_figwidth() // 1.4))
    figure.legend(keys.values(), keys, loc="outside upper center", frameon=False, **options)
    width = int(figure.get_figwidth() * 17)  # characters of the small print
    lines = textwrap.wrap(note, width) + textwrap.wrap(result.conditions, width)
    figure.supxlabel("\n".join(lines), fontsize=7, color="#555555")
    path = out / f"{result.device}-{name}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
