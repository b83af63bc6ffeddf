"""Every op with a kernel against float64, at three shapes: forward, and what backward gives."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_attention, bench_layers
from benchmarks.case import Case, Suite
from benchmarks.measure import NotTimedError, Prepared

# Batch, heads, tokens, head dimension: a ViT's; one that no tile fits; one of many tiles.
ATTENTION = [(2, 3, 197, 64), (1, 2, 50, 72), (1, 2, 1030, 128)]
ROWS = [(3 * 197, 384), (50, 1000), (1030, 3072)]  # rows, width
DTYPES = ("bf16", "fp16", "fp32")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    words = "processes, which share the GPU (default: 8)"
    parser.add_argument("--jobs", type=int, default=8, help=words)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for row in pool.imap_unordered(check, cases()):
            rows.append(row)
            print(row["status"], f"{row['group']} {row['case']}", row["note"], flush=True)
            options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(row["status"] != "ok" for row in rows))


def cases() -> list[Case]:
    """Those that take longest to compile first."""
    return [*_attention_cases(), *_layer_cases()]


def _attention_cases() -> Iterator[Case]:
    for dtype, group in itertools.product(DTYPES[::-1], bench_attention.KINDS):
        for shape in ATTENTION[:1] if dtype == "fp32" else ATTENTION:  # others compile for minutes
            yield Case(group, "attention", shape, dtype)
        yield Case(group, "attention", ATTENTION[0], dtype, causal=True)


def _layer_cases() -> Iterator[Case]:
    for name, dtype, (rows, width) in itertools.product(bench_layers.LAYERS, DTYPES, ROWS):
        linear = name == "linear"
        shape = (rows, width, 200) if linear else (rows, width)
        for suffix in ("", bench_layers.STEP):
            yield Case("linear" if linear else "elementwise", name + suffix, shape, dtype)


def check(case: Case) -> dict[str, Any]:
    """The case's error, and whether it is allowed."""
    suite: Suite = (bench_attention if case.op == "attention" else bench_layers).SUITE
    ours = suite.providers(case)[0]
    row = {"case": str(case), **asdict(case), "status": "ok", "allowed": suite.allowed(case, ours)}
    try:
        prepared = Prepared(suite, case, torch.device("cuda"))
        prepared.checked_call(ours)
    except NotTimedError as problem:
        return row | {"status": problem.status, "error": None, "note": str(problem)}
    error = prepared.errors[ours.name]
    return row | {"error": error, "note": "" if error is None else f"error {error:.1e}"}


if __name__ == "__main__":
    sys.exit(main())
