"""What the structure of the Jacobian saves, before and after, on a CPU: a table and its JSON.

    python -m benchmarks.structure --out DIR

Exact fits by passes through the whole last block and by layer factors; steps of the last block for
all rows and for the read one; low-rank deltas multiplied out and by their factors. A ViT-S/14 at
98 px (50 tokens) with random weights. Ways of a case run in turn, in one process of one thread;
figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.data import TensorDataset

from tangent_ops import fit_exact, last_blocks, linearize
from tangent_ops.exact import Influence, Problem
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.allocator import keep_memory
from tools.machine import about

Ways = dict[str, Callable[[], object]]
TARGETS = {  # case -> (way, of, sense, bound): a ratio of medians, or seconds if of is None
    "exact fit, 100 images x 8": ("before", "after", ">=", 20.0),
    "exact fit, 1,000 images x 8": ("after", None, "<=", 15.0),
    "influence, 80 images x 10": ("after", None, "<=", 1.0),
    "TAFT-1 step, read row": ("before", "after", ">=", 7.0),
    "TAFT-1 step, read row, qk norm": ("before", "after", ">=", 3.5),
    "low-rank step, all blocks": ("after", "fine-tuning", "<=", 1.15),
    "low-rank forward, all blocks": ("after", "fine-tuning", "<=", 2.1),
}


def vit(classes: int, **options: Any) -> Any:
    """A ViT-S/14 at 98 px, with random weights that are no longer those of its initialization."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_dinov2", img_size=98, num_classes=classes, **options
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def tail_of(classes: int, rows: bool = True, **options: Any) -> Any:
    """The tangent model of the last block, norm and head; tokens in."""
    model = vit(classes, **options)
    tail = linearize(model, last_blocks(model, 1), check=False).split()[1]
    anchor: Any = tail.anchor
    anchor.rows = anchor.rows if rows else 0
    return tail


def tokens(count: int, classes: int) -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(count, 50, 384), torch.arange(count) % classes)


def fits(count: int, before: bool) -> Ways:
    def run(tail: Any, representation: str) -> Callable[[], object]:
        data = tokens(count, 8)

        def work() -> None:
            tail.zero_()
            options: Any = {"progress": False, "representation": representation}
            fit_exact(Problem(tail, data, 10.0, **options))

        return work

    ways = {"after": run(tail_of(8), "auto")}
    return {"before": run(tail_of(8, rows=False), "passes")} | ways if before else ways


def influences() -> Ways:
    tail, data = tail_of(10), tokens(80, 10)
    return {"after": lambda: Influence(Problem(tail, data, 10.0, progress=False)).left_out()}


def steps(**options: Any) -> Ways:
    inputs, targets = tokens(32, 10).tensors
    loss = RescaledSquareLoss()

    def run(tail: Any) -> Callable[[], object]:
        return lambda: loss(tail(inputs), targets).backward()

    return {"before": run(tail_of(10, rows=False, **options)), "after": run(tail_of(10, **options))}


def low_rank(forward: bool) -> Ways:
    inputs, targets = torch.randn(16, 3, 98, 98), torch.arange(16) % 10
    loss, ordinary = RescaledSquareLoss(), vit(10)
    full, factors = linearize(vit(10), check=False), linearize(vit(10), rank=8, check=False)

    def run(model: Any) -> Callable[[], object]:
        if not forward:
            return lambda: loss(model(inputs), targets).backward()
        return torch.no_grad()(lambda: model(inputs))

    models = {"fine-tuning": ordinary, "before": full, "after": factors}
    return {name: run(model) for name, model in models.items()}


def medians(ways: Ways, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each way; all of them in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, work in ways.items():
            began = time.process_time()
            work()
            if turn:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


CASES: dict[str, tuple[Callable[[], Ways], int]] = {
    "exact fit, 100 images x 8": (lambda: fits(100, before=True), 1),
    "exact fit, 1,000 images x 8": (lambda: fits(1000, before=False), 3),
    "influence, 80 images x 10": (influences, 5),
    "TAFT-1 step, read row": (steps, 9),
    "TAFT-1 step, read row, qk norm": (lambda: steps(qk_norm=True), 9),
    "low-rank step, all blocks": (lambda: low_rank(forward=False), 5),
    "low-rank forward, all blocks": (lambda: low_rank(forward=True), 5),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for structure.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_memory()
    found = {}
    print(f"{'case':34}{'before':>10}{'after':>10}{'figure':>10}{'target':>10}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (make, repeats) in CASES.items():
            seconds = medians(make(), repeats)
            way, of, sense, bound = TARGETS[name]
            figure = seconds[way] / (seconds[of] if of else 1.0)
            found[name] = {"seconds": seconds, "figure": figure, "target": f"{sense} {bound}"}
            before = f"{seconds['before']:.3f}" if "before" in seconds else ""
            print(
                f"{name:34}{before:>10}{seconds['after']:>10.3f}{figure:>10.2f}"
                f"{sense:>5} {bound:g}",
                flush=True,
            )
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": about(), "threads": 1, "cases": found}
    (options.out / "structure.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
