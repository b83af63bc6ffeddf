"""Made-up results, for tests of tables, targets and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_attention import KINDS
from benchmarks.case import Case
from benchmarks.roofline import attention_cost
from benchmarks.stored import Result, Row

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
SPEEDS = {"ours": 0.5, "torch-jvp": 0.02, "compiled": 0.2, "sdpa-flash": 0.6, "sdpa-math": 0.1}


def row(case: Case, provider: str, seconds: float | None, **more: Any) -> Row:
    """A timed row; one without seconds has failed."""
    if seconds is None:
        return Row(case, provider, "failed", **{"note": "out of memory", **more})
    times = {"seconds": seconds, "lower": 0.98 * seconds, "upper": 1.05 * seconds}
    return Row(case, provider, **times, **{"error": 3e-7, **more})


def result(rows: Iterable[Row], gpu: bool = False) -> Result:
    return Result({**ENVIRONMENT, **(GPU if gpu else {})}, CEILINGS, list(rows))


def model_rows(forward: float = 3.0, step: float = 1.7, saved: float = 1.1) -> list[Row]:
    """TAFT against fine-tuning, at the given ratios."""
    found = []
    for group, times, base in (("model-forward", forward, 0.1), ("train-step", step, 0.3)):
        case = Case(group, SMALL, (8,), "fp32")
        plain = {"peak_bytes": 300_000_000, "saved_bytes": 100_000_000}
        ours = {"peak_bytes": 330_000_000, "saved_bytes": round(saved * 100_000_000)}
        found.append(row(case, "taft-all", times * base, flops=3e10, bytes=2e8, **ours))
        found.append(row(case, "finetune", base, flops=1e10, bytes=1e8, **plain))
        found.append(row(case, "torch-jvp", None))
    return found


def attention_rows(shapes: Sequence[tuple[int, int, int, int]]) -> list[Row]:
    """Every provider at a fixed part of the arithmetic limit, fp32."""
    found = []
    for group, shape in ((group, shape) for group in KINDS for shape in shapes):
        case = Case(group, "attention", shape, "fp32")
        for provider, speed in SPEEDS.items():
            question = "primal" if provider.startswith("sdpa") else "tangent"
            cost = attention_cost(KINDS[group], question, shape, 4)
            seconds = cost.flops / (speed * CEILINGS["flops/s fp32"])
            work = {"flops": cost.flops, "bytes": cost.bytes, "peak_bytes": 4 * shape[2] ** 2}
            found.append(row(case, provider, seconds, **work))
        found.append(Row(case, "sdpa-cudnn", "absent", "it runs on CUDA only"))
    return found


def write(path: Path, content: Result, turns: int = 1) -> Path:
    """As pytest-benchmark writes it; later turns are 10 % slower each."""
    benchmarks, not_timed = [], []
    for one in content.rows:
        about = {key: value for key, value in vars(one).items() if value is not None}
        about["case"] = vars(one.case)
        status, note = about.pop("status"), about.pop("note")
        if one.seconds is None:
            entry = {"case": about["case"], "provider": one.provider}
            not_timed.append({**entry, "status": status, "note": note})
            continue
        names = {"median": "seconds", "q1": "lower", "q3": "upper"}
        stats = {theirs: about.pop(own) for theirs, own in names.items()}
        for turn in range(turns):
            times = {name: value * (1 + 0.1 * turn) for name, value in stats.items()}
            benchmarks.append({"stats": times, "extra_info": about})
    own = {"environment": content.environment, "ceilings": content.ceilings}
    whole = {"benchmarks": benchmarks, "tangent_ops": {**own, "not_timed": not_timed}}
    path.write_text(json.dumps(whole), encoding="utf-8")
    return path
