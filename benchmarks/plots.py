"""Every picture of the benchmarks, from stored results.

    python -m benchmarks.plots --out DIR                # the newest result of each device
    python -m benchmarks.plots FILE... --out DIR

A picture's name begins with the device's. One without data is not drawn.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.ticker import LogLocator

from benchmarks.drawing import (
    bar_legend,
    colour,
    hatch,
    legend,
    line_style,
    save,
    side_by_side,
    stacked,
)
from benchmarks.rivals import Answers, by_case, fastest_yardstick, ratio
from benchmarks.stored import RESULTS, BadFile, device_of, folder_for, newest, read_result
from benchmarks.suite.case import Case
from benchmarks.suite.row import Result, Row
from benchmarks.units import amount, digits, duration

Draw = Callable[[Result, Path, str], list[Path]]

DIRECTIONS = {
    "attention-forward": "forward with tangent",
    "attention-backward": "backward of the tangent",
    "attention-second-order": "backward of both",
}
VIT_TOKENS = (50, 197, 257, 577)
MODEL_GROUPS = {"model-forward": ("Forward pass", 3.0), "train-step": ("Training step", 5 / 3)}
MARKERS = {"attention-forward": "o", "attention-backward": "s", "attention-second-order": "D"}
MARKERS |= {"linear": "^"}
CLIP = 12.0  # the highest bar: rivals far above would flatten the rest


def draw_all(result: Result, out: Path) -> dict[str, list[Path]]:
    """Every kind of picture of a result, and the files drawn of it."""
    device = device_of(result)
    return {kind: draw(result, out, device) for kind, draw in KINDS.items()}


# --- attention against the number of tokens ------------------------------------------------------


def draw_time(result: Result, out: Path, device: str) -> list[Path]:
    return _against_tokens(
        result, out, device, "time", "time per image and head", lambda row: row.seconds, duration
    )


def draw_memory(result: Result, out: Path, device: str) -> list[Path]:
    return _against_tokens(
        result, out, device, "memory", "peak memory per image and head", _peak, amount
    )


def _peak(row: Row) -> float | None:
    return row.peak_bytes or None  # 0 has no logarithm


def _against_tokens(
    result: Result,
    out: Path,
    device: str,
    kind: str,
    label: str,
    figure_of: Callable[[Row], float | None],
    words: Callable[[float], str],
) -> list[Path]:
    """One picture per dtype, causal and head dimension that has two lengths or more."""
    drawn = []
    for (dtype, causal, depth), directions in _series(result, figure_of).items():
        figure, axes = side_by_side(len(directions))
        shown: dict[str, None] = {}
        for axis, (group, lines) in zip(axes, directions.items(), strict=True):
            for provider, points in lines.items():
                shown[provider] = None
                tokens, values = zip(*sorted(points.items()), strict=True)
                axis.plot(tokens, values, color=colour(provider), **line_style(provider))
            lengths = sorted({n for points in lines.values() for n in points})
            axis.set(xscale="log", yscale="log", title=DIRECTIONS[group], xlabel="tokens N")
            axis.set_xticks(lengths, [str(n) for n in lengths], rotation=90, fontsize=8)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if _is_short(lines) else (1,)))
            axis.yaxis.set_major_formatter(lambda value, _: re.sub(r"\.0+ ", " ", words(value)))
            axis.minorticks_off()
            axis.grid(True)
        axes[0].set_ylabel(label)
        legend(figure, shown)
        name = f"{device}-{kind}-{dtype}-d{depth}{'-causal' if causal else ''}.png"
        title = f"Attention, {dtype}, D = {depth}{', causal' if causal else ''}: {label}"
        note = "Dashed: PyTorch's attention without a tangent."
        drawn.append(save(figure, out / name, title, result, note))
    return drawn


def _is_short(lines: Lines) -> bool:
    """Whether decades alone are too few ticks."""
    values = [value for points in lines.values() for value in points.values()]
    return max(values) < 100 * min(values)


Points = dict[int, float]  # by the number of tokens
Lines = dict[str, Points]  # by provider


def _series(
    result: Result, figure_of: Callable[[Row], float | None]
) -> dict[tuple[str, bool, int], dict[str, Lines]]:
    """Values by (dtype, causal, D), direction, provider and tokens; per image and head.

    Of several batches or heads with as many tokens, the first measured counts.
    """
    found: dict[tuple[str, bool, int], dict[str, Lines]] = {}
    for row in result.rows:
        value = figure_of(row) if row.status == "ok" and row.case.group in DIRECTIONS else None
        if value is None:
            continue
        batch, heads, tokens, depth = row.case.shape
        directions = found.setdefault((row.case.dtype, row.case.causal, depth), {})
        points = directions.setdefault(row.case.group, {}).setdefault(row.provider, {})
        points.setdefault(tokens, value / (batch * heads))
    enough = {}
    for key, directions in found.items():
        kept = {
            group: lines
            for group, lines in directions.items()
            if len({n for points in lines.values() for n in points}) >= 2
        }
        if kept:
            enough[key] = kept
    return enough


# --- roofline ------------------------------------------------------------------------------------


def draw_roofline(result: Result, out: Path, device: str) -> list[Path]:
    """One picture per dtype whose limits are known: attention and linear, every provider."""
    drawn = []
    bandwidth = result.ceilings.get("bytes/s")
    for name, rate in result.ceilings.items():
        dtype = name.removeprefix("flops/s ")
        rows = [row for row in result.rows if row.case.dtype == dtype and _has_intensity(row)]
        if name == dtype or bandwidth is None or not rows:
            continue
        figure, (axis,) = side_by_side(1, width=7.5, height=4.6)
        for row in rows:
            assert row.seconds is not None
            axis.scatter(
                row.flops / row.bytes,
                row.flops / row.seconds,
                color=colour(row.provider),
                marker=MARKERS[row.case.group],
                s=22,
                alpha=0.8,
                linewidths=0,
            )
        reach = [row.flops / row.bytes for row in rows] + [rate / bandwidth]
        ends = (min(reach) / 2, max(reach) * 3)
        roof = [min(rate, bandwidth * x) for x in (ends[0], rate / bandwidth, ends[1])]
        axis.plot([ends[0], rate / bandwidth, ends[1]], roof, color="#444444", linewidth=1.2)
        axis.annotate(
            f"matmul, {digits(rate / 1e12)} TFLOP/s",
            (ends[1], rate),
            (0, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
        axis.annotate(
            f"copy, {digits(bandwidth / 1e9)} GB/s",
            (ends[0], bandwidth * ends[0]),
            (6, -10),
            textcoords="offset points",
            fontsize=8,
        )
        axis.set(xscale="log", yscale="log", ylabel="FLOP/s", xlim=ends)
        axis.set_xlabel("arithmetic intensity: least FLOPs / least bytes")
        axis.grid(True)
        legend(figure, dict.fromkeys(row.provider for row in rows), line=False)
        groups = dict.fromkeys(row.case.group for row in rows)
        signs = {"o": "circles", "s": "squares", "D": "diamonds", "^": "triangles"}
        note = "; ".join(f"{signs[MARKERS[group]]}: {group}" for group in groups)
        path = out / f"{device}-roofline-{dtype}.png"
        drawn.append(save(figure, path, f"Roofline, {dtype}", result, note))
    return drawn


def _has_intensity(row: Row) -> bool:
    return row.case.group in MARKERS and bool(row.seconds and row.flops and row.bytes)


# --- bars ----------------------------------------------------------------------------------------


def draw_vit_attention(result: Result, out: Path, device: str) -> list[Path]:
    """ViT shapes: a panel per direction, a group of bars per number of tokens."""
    drawn = []
    cases = [
        (case, answers)
        for case, answers in by_case(result.rows).items()
        if case.group in DIRECTIONS and case.shape[2] in VIT_TOKENS and not case.causal
    ]
    for dtype, heads, depth in dict.fromkeys((c.dtype, c.shape[1], c.shape[3]) for c, _ in cases):
        chosen = [
            (case, answers)
            for case, answers in cases
            if (case.dtype, case.shape[1], case.shape[3]) == (dtype, heads, depth)
        ]
        panels = [
            (DIRECTIONS[group], _bars_of_tokens([one for one in chosen if one[0].group == group]))
            for group in DIRECTIONS
        ]
        panels = [(title, bars) for title, bars in panels if bars]
        if not panels:
            continue
        figure, axes = stacked(len(panels))
        for axis, (title, bars) in zip(axes, panels, strict=True):
            _draw_bars(axis, bars)
            axis.set(title=title, ylabel="times PyTorch's fastest")
        axes[-1].set_xlabel("tokens N")
        bar_legend(figure, _providers(bars for _, bars in panels))
        name = f"{device}-vit-attention-{dtype}-h{heads}-d{depth}.png"
        title = f"Attention at ViT shapes, {dtype}, {heads} heads, D = {depth}"
        note = f"Over PyTorch's fastest attention without a tangent. Bars end at {CLIP:.0f}."
        drawn.append(save(figure, out / name, title, result, note))
    return drawn


Bars = dict[str, dict[str, float]]  # heights by label of the group, then provider


def _bars_of_tokens(cases: Sequence[tuple[Case, Answers]]) -> Bars:
    found: Bars = {}
    for case, answers in cases:
        base = fastest_yardstick(answers)
        heights = {name: ratio(row, base) for name, row in answers.items()}
        known = {name: height for name, height in heights.items() if height is not None}
        if known:
            found.setdefault(str(case.shape[2]), known)
    return found


def draw_models(result: Result, out: Path, device: str) -> list[Path]:
    """End to end: time and memory over fine-tuning's; a picture per question, dtype and batch."""
    drawn = []
    cases = by_case(row for row in result.rows if row.case.group in MODEL_GROUPS)
    for group, dtype, batch in dict.fromkeys((c.group, c.dtype, c.shape[0]) for c in cases):
        chosen = {
            case.op.removesuffix("_patch16_224"): answers
            for case, answers in cases.items()
            if (case.group, case.dtype, case.shape[0]) == (group, dtype, batch)
        }
        words, bound = MODEL_GROUPS[group]
        panels = [("time", "seconds", bound), ("peak memory", "peak_bytes", None)]
        heights = [
            {name: high for name, a in chosen.items() if (high := _over_finetune(a, attribute))}
            for _, attribute, _ in panels
        ]
        panels = [(*panel, bars) for panel, bars in zip(panels, heights, strict=True) if bars]
        if not panels:
            continue
        figure, axes = side_by_side(len(panels), width=4.6)
        for axis, (title, _, line, bars) in zip(axes, panels, strict=True):
            _draw_bars(axis, bars)
            if line is not None:
                axis.axhline(line, color="#444444", linewidth=1, linestyle=":")
            axis.set(title=title)
        axes[0].set_ylabel("times fine-tuning")
        bar_legend(figure, _providers(panel[-1] for panel in panels))
        title = f"{words}, whole models, {dtype}, batch {batch}"
        note = "Over ordinary fine-tuning. Dotted: the bound by counting products, 3 or 5/3."
        path = out / f"{device}-{group}-{dtype}-b{batch}.png"
        drawn.append(save(figure, path, title, result, note))
    return drawn


def _providers(bars: Iterable[Bars]) -> dict[str, None]:
    return dict.fromkeys(name for panel in bars for group in panel.values() for name in group)


def _over_finetune(answers: Answers, attribute: str) -> dict[str, float]:
    base = answers.get("finetune")
    if base is None or not getattr(base, attribute):
        return {}
    values = {name: getattr(row, attribute) for name, row in answers.items()}
    return {name: value / getattr(base, attribute) for name, value in values.items() if value}


def _draw_bars(axis, bars: Bars) -> None:
    """Groups of bars with their heights written above."""
    highest = 0.0
    for index, group in enumerate(bars.values()):
        width = 0.8 / len(group)
        for position, (provider, height) in enumerate(group.items()):
            x, top = index - 0.4 + width * (position + 0.5), min(height, CLIP)
            highest = max(highest, top)
            axis.bar(
                x, top, 0.9 * width, color=colour(provider), hatch=hatch(provider), ec="white", lw=0
            )
            words = f"{height:.2f}" if height < 10 else f"{height:.0f}"
            axis.text(x, top, f" {words}", ha="center", va="bottom", fontsize=6.5, rotation=90)
    axis.set_xticks(range(len(bars)), list(bars))
    axis.axhline(1, color="#444444", linewidth=0.8)
    axis.set_ylim(0, 1.25 * highest)
    axis.grid(True, axis="y")


KINDS: dict[str, Draw] = {
    "time": draw_time,
    "memory": draw_memory,
    "roofline": draw_roofline,
    "ViT attention": draw_vit_attention,
    "models": draw_models,
}


def _results(files: Sequence[Path]) -> Iterable[Result]:
    if not files:
        if found := newest(RESULTS):
            return found.values()
        raise BadFile(f"{RESULTS} holds no result: name a FILE")
    results = [read_result(path) for path in files]
    devices = [device_of(result) for result in results]
    for device in devices:
        if devices.count(device) > 1:
            raise BadFile(f"two files of {device}: draw them into folders of their own")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="suite.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    options = parser.parse_args()
    try:
        results = _results(options.files)
        out = folder_for(options.out)
    except BadFile as problem:
        print(problem, file=sys.stderr)
        return 2
    for result in results:
        for kind, paths in draw_all(result, out).items():
            for path in paths:
                print(path)
            if not paths:
                print(f"{device_of(result)}: no data for pictures of {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
