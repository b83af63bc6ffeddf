"""What the project promises of its speed and memory, held against a result.

    python -m benchmarks.targets FILE...

A target counts for every case that has what its name says (shape, dtype): the worst one is held
against the bound. An answer of ours that is wrong or failed there is a target not met.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.console import wide_console
from benchmarks.rivals import Answers, by_case, fastest_yardstick
from benchmarks.stored import conditions, show_files
from benchmarks.suite.case import Case
from benchmarks.suite.row import Result, Row

Verdict = Literal["met", "not met", "not measured"]
Sense = Literal["<=", ">="]
Which = Mapping[str, object]  # attributes of a case; "tokens" is the third size of attention


@dataclass(frozen=True)
class Value:
    """A figure of one case: its value, or None and why."""

    where: str
    value: float | None
    broken: bool = False  # ours is wrong, or failed


@dataclass(frozen=True)
class Target:
    """A promise.

    Attributes:
        name: what is promised, of which shapes.
        device: "cpu" or "gpu".
        sense: how the figure stands to the bound.
        bound: a ratio.
        values: the figure of every case that is meant.
    """

    name: str
    device: str
    sense: Sense
    bound: float
    values: Callable[[Result], Sequence[Value]]


@dataclass(frozen=True)
class Finding:
    """A target held against a result: the worst value, and where; or why there is none."""

    target: Target
    value: float | None
    where: str
    verdict: Verdict


def judge(target: Target, result: Result) -> Finding:
    """Whether the result meets the target."""
    if target.device != ("gpu" if "gpu" in result.environment else "cpu"):
        return Finding(target, None, f"a target for a {target.device.upper()}", "not measured")
    values = target.values(result)
    for one in values:
        if one.broken:
            return Finding(target, None, one.where, "not met")
    numbers = [(one.value, one.where) for one in values if one.value is not None]
    if not numbers:
        return Finding(target, None, values[0].where if values else "no such case", "not measured")
    value, where = max(numbers) if target.sense == "<=" else min(numbers)
    met = value <= target.bound if target.sense == "<=" else value >= target.bound
    return Finding(target, value, where, "met" if met else "not met")


# --- figures -------------------------------------------------------------------------------------


def _over(
    group: str,
    provider: str,
    rival: str,
    which: Which,
    of: str = "seconds",
    inverse: bool = False,
) -> Callable[[Result], list[Value]]:
    """The provider's seconds (or `of`) over its rival's, or the inverse; "sdpa": the fastest."""

    def values(result: Result) -> list[Value]:
        found = []
        for case, answers in _matching(result, group, which):
            ours = answers.get(provider)
            other = fastest_yardstick(answers) if rival == "sdpa" else answers.get(rival)
            if (missing := _missing(case, ours, provider, other, rival, of)) is not None:
                found.append(missing)
                continue
            ratio = getattr(ours, of) / getattr(other, of)
            found.append(Value(str(case), 1 / ratio if inverse else ratio))
        return found

    return values


def _missing(
    case: Case, ours: Row | None, provider: str, other: Row | None, rival: str, of: str
) -> Value | None:
    """Why there is no ratio, if there is none."""
    for row, name in ((ours, provider), (other, rival)):
        if row is None:
            return Value(f"{case}: no {name}", None)
        if row.status != "ok":
            broken = row is ours and row.status != "absent"
            return Value(f"{case}: {name}: {row.status}: {row.note}", None, broken)
        if not getattr(row, of):
            return Value(f"{case}: {name}: no {of}", None)
    return None


def _of_ceiling(result: Result) -> list[Value]:
    """FLOP/s of the dual attention over those of a large matmul, from 4096 tokens on."""
    found = []
    for case, answers in _matching(result, "attention-forward", {"dtype": "bf16"}):
        row, limit = answers.get("ours"), result.ceilings.get("flops/s bf16")
        if case.shape[2] < 4096 or row is None:
            continue
        if row.status != "ok":
            broken = row.status != "absent"
            found.append(Value(f"{case}: ours: {row.status}: {row.note}", None, broken))
        elif limit and row.seconds:
            found.append(Value(str(case), row.flops / row.seconds / limit))
    return found


def _growth(result: Result) -> list[Value]:
    """Peak memory per token and head, of the longest over the shortest sequence from 1024 on."""
    series: dict[tuple, list[tuple[int, float]]] = {}
    for case, answers in _matching(result, "attention-forward", {"dtype": "bf16"}):
        batch, heads, tokens, depth = case.shape
        row = answers.get("ours")
        if tokens >= 1024 and row is not None and row.peak_bytes:
            per_token = row.peak_bytes / (batch * heads * tokens)
            series.setdefault((depth, case.causal), []).append((tokens, per_token))
    found = []
    for (depth, causal), points in series.items():
        (first, low), (last, high) = min(points), max(points)
        if last > first:
            where = f"N = {first} to {last}, D = {depth}{' causal' if causal else ''}"
            found.append(Value(where, high / low))
    return found


def _matching(result: Result, group: str, which: Which) -> Iterator[tuple[Case, Answers]]:
    """The group's cases with these attributes."""
    for case, answers in by_case(result.rows).items():
        about = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "causal": case.causal}
        about["tokens"] = case.shape[2] if len(case.shape) == 4 else None
        if case.group == group and all(about[key] == value for key, value in which.items()):
            yield case, answers


# --- the targets ---------------------------------------------------------------------------------

_SMALL = {"op": "vit_small_patch16_224", "shape": (8,), "dtype": "fp32"}
_BASE = {"op": "vit_base_patch16_224", "dtype": "bf16"}
_HOME = {"shape": (64, 12, 197, 64), "dtype": "bf16", "causal": False}
_LONG = {"tokens": 4096, "dtype": "bf16"}
_BF16 = {"dtype": "bf16"}
_FORWARD = "attention-forward"
_COMPILED = ("train-step", "taft-all-compiled", "finetune-compiled")

DUAL_FORWARD = Target(
    "dual forward / plain forward, ViT-S/16, batch 8, fp32",
    "cpu",
    "<=",
    3.0,
    _over("model-forward", "taft-all", "finetune", _SMALL),
)
STEP = Target(
    "tangent step / fine-tuning step, ViT-S/16, batch 8, fp32",
    "cpu",
    "<=",
    1.70,
    _over("train-step", "taft-all", "finetune", _SMALL),
)
SAVED = Target(
    "bytes saved for backward, tangent / fine-tuning, ViT-S/16, batch 8, fp32",
    "cpu",
    "<=",
    1.10,
    _over("train-step", "taft-all", "finetune", _SMALL, of="saved_bytes"),
)
TARGETS = (
    DUAL_FORWARD,
    STEP,
    SAVED,
    Target(
        "attention, dual forward / fastest SDPA forward, B64 H12 N197 D64, bf16",
        "gpu",
        "<=",
        2.0,
        _over(_FORWARD, "ours", "sdpa", _HOME),
    ),
    Target(
        "attention, dual forward / fastest SDPA forward, N = 4096, bf16",
        "gpu",
        "<=",
        3.0,
        _over(_FORWARD, "ours", "sdpa", _LONG),
    ),
    Target(
        "attention, dual forward: part of the matmul ceiling, N >= 4096, bf16",
        "gpu",
        ">=",
        0.60,
        _of_ceiling,
    ),
    Target(
        "attention, tangent-only backward / fastest SDPA backward, bf16",
        "gpu",
        "<=",
        1.1,
        _over("attention-backward", "ours", "sdpa", _BF16),
    ),
    Target(
        "attention, times faster than torch.func.jvp, N = 4096, bf16",
        "gpu",
        ">=",
        20.0,
        _over(_FORWARD, "ours", "torch-jvp", _LONG, inverse=True),
    ),
    Target(
        "attention, growth of peak memory per token with N (linear: 1), bf16",
        "gpu",
        "<=",
        1.1,
        _growth,
    ),
    Target(
        "attention, times faster than jvp-flash-attention, bf16",
        "gpu",
        ">=",
        2.0,
        _over(_FORWARD, "ours", "jvp-flash-attention", _BF16, inverse=True),
    ),
    Target(
        "tangent step / fine-tuning step, both compiled, ViT-B/16, bf16",
        "gpu",
        "<=",
        1.70,
        _over(*_COMPILED, _BASE),
    ),
    Target(
        "peak memory of the tangent step / fine-tuning, both compiled, ViT-B/16, bf16",
        "gpu",
        "<=",
        1.10,
        _over(*_COMPILED, _BASE, of="peak_bytes"),
    ),
)


def print_targets(console: Console, result: Result) -> None:
    """A table of all targets: bound, worst value, where, verdict."""
    table = Table(title="Targets", title_justify="left", box=None)
    for heading in ("target", "bound", "measured", "", "where"):
        table.add_column(heading, justify="right" if heading in ("bound", "measured") else "left")
    for target in TARGETS:
        found = judge(target, result)
        measured = "" if found.value is None else f"{found.value:.3f}"
        bound = f"{target.sense} {target.bound:.2f}"
        where = Text(found.where)  # a note may look like markup
        table.add_row(target.name, bound, measured, found.verdict, where)
    console.print(table)
    console.print(conditions(result), highlight=False, markup=False, soft_wrap=True)


def main() -> int:
    return show_files(lambda result: print_targets(wide_console(), result), __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
