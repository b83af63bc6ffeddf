"""Results that nobody measured, for tests of what is made of results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.roofline import attention_cost
from benchmarks.suite.case import Case
from benchmarks.suite.row import Result, Row
from benchmarks.timing import Timing

CEILINGS = {"bytes/s": 1e10, "flops/s fp32": 1e11, "flops/s bf16": 1e12}
ENVIRONMENT = {
    "cpu": "An Example CPU, 2 cores",
    "threads": "2",
    "torch": "2.14.0",
    "commit": "0123456789ab",
    "date": "2026-11-24 12:00 UTC",
}
GPU = {"gpu": "NVIDIA Example GPU", "cuda": "13.0"}
SMALL = "vit_small_patch16_224"
QUESTIONS = {
    "attention-forward": ("dual", "primal"),
    "attention-backward": ("tangent-backward", "primal-backward"),
    "attention-second-order": ("dual-backward", "primal-backward"),
}
SPEEDS = {"ours": 0.5, "torch-jvp": 0.02, "compiled": 0.2, "sdpa-flash": 0.6, "sdpa-math": 0.1}


def timing(seconds: float) -> Timing:
    return Timing(seconds, 0.98 * seconds, 1.05 * seconds, 9)


def row(case: Case, provider: str, seconds: float | None, **more: Any) -> Row:
    """A timed row; one without seconds has failed."""
    if seconds is None:
        return Row(case, provider, "failed", **{"note": "out of memory", **more})
    return Row(case, provider, "ok", timing=timing(seconds), **{"error": 3e-7, **more})


def result(rows: Sequence[Row], gpu: bool = False) -> Result:
    return Result({**ENVIRONMENT, **(GPU if gpu else {})}, CEILINGS, rows)


def model_rows(forward: float = 3.0, step: float = 1.7, saved: float = 1.1) -> list[Row]:
    """TAFT against fine-tuning, at the given ratios."""
    found = []
    for group, ratio, base in (("model-forward", forward, 0.1), ("train-step", step, 0.3)):
        case = Case(group, SMALL, (8,), "fp32")
        kept = {"peak_bytes": 300_000_000, "saved_bytes": 100_000_000}
        more = {"peak_bytes": 330_000_000, "saved_bytes": round(saved * 100_000_000)}
        found.append(row(case, "taft-all", ratio * base, flops=3e10, bytes=2e8, **more))
        found.append(row(case, "taft-1", 0.5 * base, flops=1e10, bytes=1e8, **kept))
        found.append(row(case, "finetune", base, flops=1e10, bytes=1e8, **kept))
        found.append(row(case, "torch-jvp", None))
    return found


def attention_rows(
    shapes: Sequence[tuple[int, int, int, int]],
    dtype: str = "fp32",
    causal: bool = False,
    groups: Sequence[str] = tuple(QUESTIONS),
) -> list[Row]:
    """Every provider at a fixed part of the arithmetic limit."""
    found = []
    for group in groups:
        for shape in shapes:
            case = Case(group, "attention", shape, dtype, causal)
            batch, heads, tokens, depth = shape
            for provider, speed in SPEEDS.items():
                question = QUESTIONS[group][provider.startswith("sdpa")]
                cost = attention_cost(question, shape, 4 if dtype == "fp32" else 2, causal)
                seconds = cost.flops / (speed * CEILINGS[f"flops/s {dtype}"])
                squares = batch * heads * tokens * (8 if provider == "ours" else tokens)
                memory = 4 * batch * heads * tokens * depth + squares
                work = {"flops": cost.flops, "bytes": cost.bytes}
                found.append(row(case, provider, seconds, peak_bytes=memory, **work))
            found.append(Row(case, "sdpa-cudnn", "absent", "CUDA alone has this backend"))
    return found


def write(path: Path, content: Result) -> Path:
    """As the suite's own file: under "tangent_ops"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine_info": {}, "tangent_ops": content.to_json()}))
    return path
