"""Pictures of a result: time and memory against the number of tokens, roofline, whole models."""

from __future__ import annotations

import textwrap
from collections.abc import Container
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from benchmarks.stored import Result, ratio

STYLE: Any = {  # matplotlib types its keys
    "figure.facecolor": "white",  # readable on a dark page, too
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
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
    with plt.style.context(["tableau-colorblind10", STYLE]):
        time = _against_tokens(result, out, "time", "seconds", "s")
        memory = _against_tokens(result, out, "peak memory", "peak_bytes", "B")
        return [*time, *memory, *_rooflines(result, out), *_models(result, out)]


def colours_of(result: Result, groups: Container[str]) -> dict[str, str]:
    """A colour per provider of these groups, in their order; compiled ones come last."""
    names = dict.fromkeys(row.provider for row in result.rows if row.case.group in groups)
    ordered = sorted(names, key=lambda name: name.endswith("-compiled"))
    return {name: f"C{index % 10}" for index, name in enumerate(ordered)}


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
        figure, axes = _panels(len(directions), rows=1, width=3.6, height=3.2)
        for axis, (group, lines) in zip(axes[0], directions.items(), strict=True):
            for name, points in lines.items():
                style = "s--" if name.startswith("sdpa-") else "o-"
                pairs = zip(*sorted(points.items()), strict=True)
                axis.plot(*pairs, style, ms=4, color=colours[name], label=name)
            axis.set(xscale="log", yscale="log", title=DIRECTIONS[group], xlabel="tokens N")
            axis.set_xticks(lengths, [str(n) for n in lengths], rotation=90, fontsize=8)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(EngFormatter(unit))
            axis.minorticks_off()
        axes[0, 0].set_ylabel(f"{what} per image and head")
        kind = ", causal" if causal else ""
        title = f"Attention, {dtype}, D = {depth}{kind}: {what} per image and head"
        note = "Dashed: PyTorch's attention without a tangent."
        name = f"{what.split()[-1]}-{dtype}-d{depth}{'-causal' if causal else ''}"
        drawn.append(_save(figure, out, name, title, result, note))
    return drawn


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
        figure, ((axis,),) = _panels(1, rows=1, width=7.5, height=4.4)
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
        words = f"matmul, {rate / 1e12:.3g} TFLOP/s"
        axis.annotate(words, (ends[1], rate), (0, 4), ha="right", **options)
        words = f"copy, {bandwidth / 1e9:.3g} GB/s"
        axis.annotate(words, (ends[0], bandwidth * ends[0]), (6, -10), **options)
        axis.set(xscale="log", yscale="log", ylabel="FLOP/s", xlim=ends)
        axis.set_xlabel("arithmetic intensity: least FLOPs / least bytes")
        groups = dict.fromkeys(row.case.group for row in rows)
        note = "; ".join(f"{MARKERS[group][1]}: {group}" for group in groups)
        drawn.append(_save(figure, out, f"roofline-{dtype}", f"Roofline, {dtype}", result, note))
    return drawn


def _models(result: Result, out: Path) -> list[Path]:
    """Time and memory over fine-tuning's: a picture per question, a line of panels per case."""
    drawn, colours = [], colours_of(result, MODELS)
    for group, (words, bound) in MODELS.items():
        cases = {case: row for case, row in result.by_case().items() if case.group == group}
        if not cases:
            continue
        figure, axes = _panels(2, rows=len(cases), width=4.6, height=2.6)
        for line, (case, answers) in zip(axes, cases.items(), strict=True):
            for axis, of in zip(line, ("seconds", "peak_bytes"), strict=True):
                base = answers.get("finetune")
                times = {name: ratio(row, base, of) or 0.0 for name, row in answers.items()}
                names = [name for name in colours if times.get(name)]
                heights = [times[name] for name in names]
                bars = axis.barh(names, heights, color=[colours[name] for name in names])
                axis.bar_label(bars, fmt=" %.2f", fontsize=7)
                axis.set(title=f"{case}: {'time' if of == 'seconds' else 'peak memory'}")
                axis.axvline(1, color="#444444", linewidth=0.8)
                axis.margins(x=0.15)
                axis.invert_yaxis()
                axis.grid(visible=False, axis="y")
            line[0].axvline(bound, color="#444444", linewidth=1, linestyle=":")
        note = "Over ordinary fine-tuning. Dotted: the bound by counting products, 3 or 5/3."
        drawn.append(_save(figure, out, group, f"{words}, whole models", result, note))
    return drawn


def _panels(columns: int, rows: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure with panels of that many inches."""
    size = (width * columns, height * rows + 1)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


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
