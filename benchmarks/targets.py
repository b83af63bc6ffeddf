"""What the project promises of its speed and memory, compared with a result.

A target holds for every case that its name describes: the worst one is compared with the bound. A
wrong or failed answer of ours misses the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    group: str,
    provider: str,
    rival: str,
    which: Mapping[str, object],
    of: str = "seconds",
    inverse: bool = False,
) -> Figure:
    """The provider's seconds (or `of`) over its rival's, or the inverse; "sdpa": the fastest."""

    def figure(result: Result) -> list[Finding]:
        found = []
        for case, answers in _matching(result, group, which):
            ours = answers.get(provider)
            other = fastest_plain(answers) if rival == "sdpa" else answers.get(rival)
            pair = (other, ours) if inverse else (ours, other)
            found.append(_value(case, answers, provider, rival, ratio(*pair, of)))
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
    for case, answers in _matching(result, "attention-forward", {"dtype": "bf16"}):
        if case.shape[2] >= 4096 and (row := answers.get("ours")) is not None:
            part = row.flops / row.seconds / limit if row.seconds and limit else None
            found.append(_value(case, answers, "ours", "ours", part))
    return found


def _growth(result: Result) -> list[Finding]:
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
            found.append(Finding(where, high / low))
    return found


def _matching(
    result: Result, group: str, which: Mapping[str, object]
) -> Iterator[tuple[Case, Answers]]:
    """The group's cases with these attributes; "tokens" is the third size of attention."""
    for case, answers in result.by_case().items():
        about = {**vars(case), "tokens": case.shape[2] if len(case.shape) == 4 else None}
        if case.group == group and all(about[key] == value for key, value in which.items()):
            yield case, answers


_SMALL = {"op": "vit_small_patch16_224", "shape": (8,), "dtype": "fp32"}
_BASE = {"op": "vit_base_patch16_224", "dtype": "bf16"}
_HOME = {"shape": (64, 12, 197, 64), "dtype": "bf16", "causal": False}
_LONG = {"tokens": 4096, "dtype": "bf16"}
_BF16 = {"dtype": "bf16"}
_TAFT = ("taft-all", "finetune", _SMALL)
_FORWARD = ("attention-forward", "ours")
_BACKWARD = ("attention-backward", "ours")
_COMPILED = ("train-step", "taft-all-compiled", "finetune-compiled", _BASE)
_FLASH_JVP = "jvp-flash-attention"


def _targets() -> Iterator[Target]:
    small, base = "ViT-S/16, batch 8, fp32", "ViT-B/16, bf16"
    name = f"dual forward / plain forward, {small}"
    yield Target(name, "cpu", "<=", 3.0, _over("model-forward", *_TAFT))
    name = f"tangent step / fine-tuning step, {small}"
    yield Target(name, "cpu", "<=", 1.70, _over("train-step", *_TAFT))
    name = f"bytes saved for backward, tangent / fine-tuning, {small}"
    yield Target(name, "cpu", "<=", 1.10, _over("train-step", *_TAFT, of="saved_bytes"))
    name = "attention, dual forward / fastest SDPA forward, B64 H12 N197 D64, bf16"
    yield Target(name, "gpu", "<=", 2.0, _over(*_FORWARD, "sdpa", _HOME))
    name = "attention, dual forward / fastest SDPA forward, N = 4096, bf16"
    yield Target(name, "gpu", "<=", 3.0, _over(*_FORWARD, "sdpa", _LONG))
    name = "attention, dual forward: part of the matmul ceiling, N >= 4096, bf16"
    yield Target(name, "gpu", ">=", 0.60, _of_ceiling)
    name = "attention, tangent-only backward / fastest SDPA backward, bf16"
    yield Target(name, "gpu", "<=", 1.1, _over(*_BACKWARD, "sdpa", _BF16))
    name = "attention, times faster than torch.func.jvp, N = 4096, bf16"
    yield Target(name, "gpu", ">=", 20.0, _over(*_FORWARD, "torch-jvp", _LONG, inverse=True))
    name = "attention, growth of peak memory per token with N (linear: 1), bf16"
    yield Target(name, "gpu", "<=", 1.1, _growth)
    name = "attention, times faster than jvp-flash-attention, bf16"
    yield Target(name, "gpu", ">=", 2.0, _over(*_FORWARD, _FLASH_JVP, _BF16, inverse=True))
    name = f"tangent step / fine-tuning step, both compiled, {base}"
    yield Target(name, "gpu", "<=", 1.70, _over(*_COMPILED))
    name = f"peak memory of the tangent step / fine-tuning, both compiled, {base}"
    yield Target(name, "gpu", "<=", 1.10, _over(*_COMPILED, of="peak_bytes"))


TARGETS = tuple(_targets())
