"""Pictures of a result: time and memory against tokens, percent of the roofline, whole models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from benchmarks.case import Case
from benchmarks.roofline import percent_of_floor
from benchmarks.stored import Result, Row, ratio
from tangent_ops import pictures
from tangent_ops.pictures import Look

DIRECTIONS = {
    "attention-forward": "forward with tangent",
    "attention-backward": "backward of the tangent",
    "attention-second-order": "backward of both",
}
MODELS = {
    "model-forward": ("Forward pass", Fraction(3)),
    "train-step": ("Training step", Fraction(5, 3)),
}
ROOFED = (*DIRECTIONS, "linear")
LOOKS = {
    name: Look(name, marker, "--" if colour in pictures.ORDINARIES else "-", colour)
    for name, marker, colour in (
        ("ours", "o", pictures.TANGENT),
        ("taft-all", "o", pictures.TANGENT),
        ("taft-1", "v", pictures.TANGENT_OTHER),
        ("taft-1-cached", "^", pictures.TANGENT_OTHER),
        ("torch-jvp", "D", pictures.RIVAL),
        ("compiled", "P", pictures.RIVAL),
        ("jvp-flash-attention", "X", pictures.RIVAL),
        ("finite-differences", "d", pictures.LEVEL),
        ("sdpa-flash", "s", pictures.ORDINARY),
        ("sdpa-math", "h", pictures.ORDINARY_OTHER),
        ("sdpa-efficient", "<", pictures.ORDINARY),
        ("sdpa-cudnn", ">", pictures.ORDINARY_OTHER),
        ("plain", "p", pictures.ORDINARY),
        ("finetune", "s", pictures.ORDINARY),
        ("finetune-1", "p", pictures.ORDINARY_OTHER),
    )
}
SHAPES = "Shapes: batch x heads x N x D, and rows x in x out."
PLAIN = "Dashed: PyTorch's attention without a tangent."


@pictures.styled()
def draw_all(result: Result, out: Path) -> list[Path]:
    """Draws every picture that the result has data for; the files begin with the device's name."""
    out.mkdir(parents=True, exist_ok=True)
    time = _against_tokens(result, out, "time", "seconds", "s")
    memory = _against_tokens(result, out, "peak memory", "peak_bytes", "B")
    return [*time, *memory, *_roofs(result, out), *_models(result, out)]


def look_of(provider: str) -> Look:
    """Of a provider; one that is compiled or replayed as a graph has its eager one's colour."""
    eager = provider.removesuffix("-first").removesuffix("-graph").removesuffix("-compiled")
    found = LOOKS.get(eager, Look(eager, "*", "-", pictures.LEVEL))
    changed = ("*", ":") if provider != eager else (found.marker, found.line)
    return Look(provider, *changed, found.colour)


def _in_order(names: Iterable[str]) -> list[str]:
    """Providers as legends and bars list them: ours first, what is not known last."""
    known = list(LOOKS)
    return sorted(
        dict.fromkeys(names),
        key=lambda name: (known.index(name) if name in known else len(known), name),
    )


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
    drawn = []
    for (dtype, causal, depth), directions in series.items():
        every = [points for lines in directions.values() for points in lines.values()]
        lengths = sorted({tokens for points in every for tokens in points})
        if len(lengths) < 2:
            continue
        figure = pictures.new_figure(height=4.4)
        panels = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
        for axes, (group, lines) in zip(panels, directions.items(), strict=True):
            for name in _in_order(lines):
                tokens, values = zip(*sorted(lines[name].items()), strict=True)
                axes.plot(tokens, values, label=name, **look_of(name).drawn)
            pictures.number_axis(axes, lengths)
            axes.set(yscale="log", title=DIRECTIONS[group], xlabel="tokens N")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(EngFormatter(unit))
            axes.minorticks_off()
        panels[0].set_ylabel(f"{what} per image and head")
        kind = ", causal" if causal else ""
        title = f"Attention, {dtype}, D = {depth}{kind}: {what} per image and head"
        name = f"{what.split()[-1]}-{dtype}-d{depth}{'-causal' if causal else ''}"
        drawn.append(_save(figure, out, name, title, result, PLAIN))
    return drawn


def _roofs(result: Result, out: Path) -> list[Path]:
    """One picture per dtype: how near every case comes to the limits of this machine."""
    drawn = []
    for dtype in dict.fromkeys(row.case.dtype for row in result.rows):
        cases: dict[Case, list[tuple[float, Row]]] = {}
        for row in result.rows:
            percent = percent_of_floor(row, result.ceilings)
            if percent and row.case.dtype == dtype and row.case.group in ROOFED:
                cases.setdefault(row.case, []).append((percent, row))
        if not cases:
            continue
        figure = pictures.new_figure(height=2.0 + 0.36 * len(cases))
        axes = figure.subplots()
        names = _in_order(row.provider for rows in cases.values() for _, row in rows)
        for place, rows in enumerate(cases.values()):
            for percent, row in rows:
                look = look_of(row.provider)
                apart = 0.7 * ((names.index(row.provider) + 0.5) / len(names) - 0.5)
                points: Any = {"marker": look.marker, "color": look.colour, "linestyle": "none"}
                axes.plot(percent, place + apart, label=row.provider, markersize=5, **points)
        axes.axvline(100, color=pictures.LEVEL, linewidth=1)
        axes.set_yticks(range(len(cases)), [_named(case) for case in cases], fontsize=8.5)
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("rate, % of the roof: what the machine's limits allow")
        flops, copied = (result.ceilings[key] for key in (f"flops/s {dtype}", "bytes/s"))
        limits = f"matmul {flops / 1e12:.3g} TFLOP/s, copy {copied / 1e9:.3g} GB/s"
        words = f"Limits, measured in the same run: {limits}. {SHAPES}"
        drawn.append(_save(figure, out, f"roofline-{dtype}", f"Roofline, {dtype}", result, words))
    return drawn


def _named(case: Case) -> str:
    """A case in a line, without the dtype that the title has."""
    shape = "x".join(map(str, case.shape))
    words = DIRECTIONS.get(case.group, case.op)
    return f"{words} {shape}{', causal' if case.causal else ''}"


def _models(result: Result, out: Path) -> list[Path]:
    """Time and memory over fine-tuning's: a picture per question, a line of panels per case."""
    drawn = []
    for group, (words, bound) in MODELS.items():
        cases = {case: row for case, row in result.by_case().items() if case.group == group}
        if not cases:
            continue
        most = max(map(len, cases.values()))
        figure = pictures.new_figure(height=1.6 + len(cases) * (0.9 + 0.26 * most))
        lines = figure.subplots(len(cases), 2, sharex="row", squeeze=False)
        for line, (case, answers) in zip(lines, cases.items(), strict=True):
            for axes, of in zip(line, ("seconds", "peak_bytes"), strict=True):
                ratios = {n: ratio(row, answers.get("finetune"), of) for n, row in answers.items()}
                _draw_bars(axes, {n: ratios[n] or 0.0 for n in _in_order(answers) if ratios[n]})
                what = "time" if of == "seconds" else "peak memory"
                axes.set_xlabel(f"{what} over that of ordinary fine-tuning")
            line[0].set_title(f"{case.op}, batch {case.shape[0]}, {case.dtype}")
            line[0].axvline(float(bound), color=pictures.BLACK, linestyle=(0, (1, 2)))
            longest = max(float(bound), *(axes.dataLim.xmax for axes in line))
            line[0].set_xlim(0, 1.04 * longest)
        note = f"Dotted: the bound on taft-all's time by counting products, {bound}."
        drawn.append(_save(figure, out, group, f"{words}, whole models", result, note))
    return drawn


def _draw_bars(axes: Axes, ratios: Mapping[str, float]) -> None:
    """A bar for each provider; its number is beside the axes, where no line crosses it."""
    for place, (name, value) in enumerate(ratios.items()):
        axes.barh(place, value, color=look_of(name).colour, height=0.7)
        axes.annotate(
            f"{value:.2f}", (1, place), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=pictures.SMALL,
        )  # fmt: skip
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.invert_yaxis()
    axes.axvline(1, color=pictures.LEVEL, linewidth=1, zorder=0.9)  # behind the bars
    axes.grid(visible=False, axis="y")


def _save(figure: Figure, out: Path, name: str, title: str, result: Result, words: str) -> Path:
    """Writes the picture with title and key above, and the conditions in small print below."""
    keys: dict[str, Any] = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    pictures.legend_above(figure, 6, {name: keys[name] for name in _in_order(keys)}, title)
    pictures.note(figure, f"{words}\n{result.conditions}")
    return pictures.save(figure, out / f"{result.device}-{name}.png")
