"""What the project promises of its speed and memory, compared with a result.

A target holds for every case that its name describes: the worst one is compared with the bound. A
wrong or failed answer of ours misses the target.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.case import Case
from benchmarks.stored import Answers, Result, fastest_plain, ratio

Figure = Callable[[Result], list["Finding"]]  # one of every case that the target describes


@dataclass(frozen=True)
class Target:
    """A promise: a figure on a kind of device ("cpu", "gpu") is "<=" or ">=" a bound."""

    name: str
    kind: str
    sense: str
    bound: float
    figure: Figure


@dataclass(frozen=True)
class Finding:
    """A figure of a case, or of the worst case; without a value `where` says why."""

    where: str
    value: float | None = None
    verdict: Literal["met", "not met", "not measured"] = "not measured"


def judge(target: Target, result: Result) -> Finding:
    """Whether the result meets the target: the worst value, and where."""
    if target.kind != result.kind:
        return Finding(f"a target for a {target.kind.upper()}")
    found = target.figure(result)
    if broken := [one for one in found if one.verdict == "not met"]:
        return broken[0]
    numbers = [(one.value, one.where) for one in found if one.value is not None]
    if not numbers:
        return found[0] if found else Finding("no such case")
    value, where = max(numbers) if target.sense == "<=" else min(numbers)
    met = value <= target.bound if target.sense == "<=" else value >= target.bound
    return Finding(where, value, "met" if met else "not met")


def _over(
    cases: str, rival: str, ours: str = "ours", of: str = "seconds", inverse: bool = False
) -> Figure:
    """Our seconds (or `of`) over the rival's, or the inverse; rival "sdpa": the fastest of them."""

    def figure(result: Result) -> list[Finding]:
        found = []
        for case, answers in _matching(result, cases):
            other = fastest_plain(answers) if rival == "sdpa" else answers.get(rival)
            pair = (other, answers.get(ours)) if inverse else (answers.get(ours), other)
            found.append(_value(case, answers, ours, rival, ratio(*pair, of)))
        return found

    return figure


def _value(case: Case, answers: Answers, ours: str, rival: str, value: float | None) -> Finding:
    """The value, or why there is none; "not met" if ours is wrong, or failed."""
    for name in (ours, rival):
        row = answers.get(name)
        if row is not None and row.status != "ok":
            broken = name == ours and row.status != "absent"
            where = f"{case}: {name}: {row.status}: {row.note}"
            return Finding(where, None, "not met" if broken else "not measured")
    if value is not None:
        return Finding(str(case), value)
    missing = [f"no {name}" for name in (ours, rival) if name not in answers and name != "sdpa"]
    return Finding(f"{case}: {' and '.join(missing) or 'not measured'}")


def _of_ceiling(result: Result) -> list[Finding]:
    """FLOP/s of the dual attention over those of a large matmul, from 4096 tokens on."""
    limit, found = result.ceilings.get("flops/s bf16"), []
    for case, answers in _matching(result, f"{_FORWARD} {_BF16}"):
        if case.shape[2] >= 4096 and (row := answers.get("ours")) is not None:
            part = row.flops / row.seconds / limit if row.seconds and limit else None
            found.append(_value(case, answers, "ours", "ours", part))
    return found


def _growth(result: Result) -> list[Finding]:
    """Peak memory per token and head, of the longest over the shortest sequence from 1024 on."""
    series: dict[tuple, list[tuple[int, float]]] = {}
    for case, answers in _matching(result, f"{_FORWARD} {_BF16}"):
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
            found.append(Finding(where, high / low))
    return found


def _matching(result: Result, pattern: str) -> list[tuple[Case, Answers]]:
    """The cases whose "GROUP CASE" matches the regular expression."""
    every = result.by_case().items()
    return [(c, answers) for c, answers in every if re.fullmatch(pattern, f"{c.group} {c}")]


_SMALL = "vit_small_patch16_224 8 fp32"
_COMPILED = (r"train-step vit_base_patch16_224 \d+ bf16", "finetune-compiled", "taft-all-compiled")
_FORWARD, _BACKWARD = "attention-forward attention", "attention-backward attention"
_BF16, _LONG = r"\S+ bf16.*", r"\d+x\d+x4096x\d+ bf16.*"  # causal, too


def _targets() -> Iterator[Target]:
    small, base = "ViT-S/16, batch 8, fp32", "ViT-B/16, bf16"
    step = _over(f"train-step {_SMALL}", "finetune", "taft-all")
    saved = _over(f"train-step {_SMALL}", "finetune", "taft-all", of="saved_bytes")
    name = f"dual forward / plain forward, {small}"
    yield Target(name, "cpu", "<=", 3.0, _over(f"model-forward {_SMALL}", "finetune", "taft-all"))
    yield Target(f"tangent step / fine-tuning step, {small}", "cpu", "<=", 1.70, step)
    name = f"bytes saved for backward, tangent / fine-tuning, {small}"
    yield Target(name, "cpu", "<=", 1.10, saved)
    name = "attention, dual forward / fastest SDPA forward, B64 H12 N197 D64, bf16"
    yield Target(name, "gpu", "<=", 2.0, _over(f"{_FORWARD} 64x12x197x64 bf16", "sdpa"))
    name = "attention, dual forward / fastest SDPA forward, N = 4096, bf16"
    yield Target(name, "gpu", "<=", 3.0, _over(f"{_FORWARD} {_LONG}", "sdpa"))
    name = "attention, dual forward: part of the matmul ceiling, N >= 4096, bf16"
    yield Target(name, "gpu", ">=", 0.65, _of_ceiling)
    name = "attention, tangent-only backward / fastest SDPA backward, bf16"
    yield Target(name, "gpu", "<=", 1.0, _over(f"{_BACKWARD} {_BF16}", "sdpa"))
    name = "attention, times faster than torch.func.jvp, N = 4096, bf16"
    faster = _over(f"{_FORWARD} {_LONG}", "torch-jvp", inverse=True)
    yield Target(name, "gpu", ">=", 20.0, faster)
    name = "attention, growth of peak memory per token with N (linear: 1), bf16"
    yield Target(name, "gpu", "<=", 1.1, _growth)
    name = "attention, times faster than jvp-flash-attention, bf16"
    faster = _over(f"{_FORWARD} {_BF16}", "jvp-flash-attention", inverse=True)
    yield Target(name, "gpu", ">=", 2.0, faster)
    name = f"tangent step / fine-tuning step, both compiled, {base}"
    yield Target(name, "gpu", "<=", 1.67, _over(*_COMPILED))
    name = f"peak memory of the tangent step / fine-tuning, both compiled, {base}"
    yield Target(name, "gpu", "<=", 1.05, _over(*_COMPILED, of="peak_bytes"))


TARGETS = tuple(_targets())
