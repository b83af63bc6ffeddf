"""Accuracy against ε of private tangent fine-tuning, ordinary private fine-tuning, and a probe.

    python examples/private_study.py --out out/private-study

Every run is written down at once, and is not run again: what was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import torch
from assets import VIT_SMALL, default_cache, fetch
from backbone import load_backbone
from images import load_images
from matplotlib.figure import Figure
from private import FAILURE, SIZES, WAYS, Prepared, options_of, prepare
from rich.console import Console
from rich.table import Table
from timm.data.config import resolve_model_data_config

from tangent_ops import accuracy, fit
from tangent_ops.losses import RescaledSquareLoss

EPSILONS = (0.5, 1.0, 3.0, 8.0)
console = Console()


@dataclass(frozen=True)
class Look:
    """How a way is drawn: told apart in black and white too."""

    name: str
    marker: str
    line: str
    colour: str


LOOKS = {
    "tangent": Look("TAFT-1", "D", "-", "#0072B2"),
    "ordinary": Look("ordinary fine-tuning (Opacus)", "s", "--", "#D55E00"),
    "probe": Look("linear probe", "o", ":", "#000000"),
}


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Run what has not been run; give everything."""
    path = options.out / "study.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    found |= {"sizes": SIZES, "delta": FAILURE, "options": {way: options_of(way) for way in WAYS}}
    found |= {"torch": torch.__version__, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    for seed in options.seeds:
        wanted = {(seed, way, epsilon) for way in WAYS for epsilon in EPSILONS}
        names = {f"{s}/{way}/{epsilon:g}" for s, way, epsilon in wanted} | {f"{seed}/anchor"}
        if names <= found["runs"].keys():
            continue
        prepared = _prepared(seed, options)
        for name, run in _runs(prepared, seed, found["runs"]):
            console.print(f"{name}: {run['accuracy']:.1%}, {run.get('seconds', 0):.0f} s")
            found["runs"][name] = run
            path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _prepared(seed: int, options: argparse.Namespace) -> Prepared:
    torch.manual_seed(seed)
    model = load_backbone(fetch(VIT_SMALL, options.cache))
    images = load_images("mnist", resolve_model_data_config(model), options.cache)
    return prepare(model, images, seed, options.score_on)


def _runs(prepared: Prepared, seed: int, done: Mapping[str, Any]):
    """Runs that are not done: name, and what came out."""
    if f"{seed}/anchor" not in done:
        yield f"{seed}/anchor", {"accuracy": accuracy(prepared.tail, prepared.scored)}
    for epsilon in EPSILONS:
        for way, train in WAYS.items():
            name = f"{seed}/{way}/{epsilon:g}"
            if name not in done:
                score, spent, seconds = train(prepared, epsilon, seed)
                yield name, {"accuracy": score, "epsilon": spent, "seconds": seconds}
    if f"{seed}/tangent, not private" not in done:
        for delta in prepared.tail.deltas().values():
            delta.data.zero_()
        history = fit(prepared.tail, prepared.private, epochs=6, lr=5e-4, loss=RescaledSquareLoss())
        score = accuracy(prepared.tail, prepared.scored)
        yield f"{seed}/tangent, not private", {"accuracy": score, "seconds": history.seconds}


def of(found: Mapping[str, Any], kind: str) -> list[float]:
    """Accuracies of all seeds."""
    return [
        run["accuracy"] for name, run in found["runs"].items() if name.partition("/")[2] == kind
    ]


def draw(found: Mapping[str, Any]) -> Figure:
    """Mean and standard error over seeds against ε; what needs no private image as a line."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for way, look in LOOKS.items():
        scores = [of(found, f"{way}/{epsilon:g}") for epsilon in EPSILONS]
        means = [100 * statistics.mean(score) for score in scores]
        errors = [100 * _error(score) for score in scores]
        style: dict[str, Any] = {
            "marker": look.marker,
            "linestyle": look.line,
            "color": look.colour,
        }
        axes.errorbar(EPSILONS, means, errors, label=look.name, capsize=3, **style)
    for kind, name, line in (
        ("tangent, not private", "TAFT-1, not private", "-."),
        ("anchor", "public probe: no private image", (0, (1, 3))),
    ):
        level = 100 * statistics.mean(of(found, kind))
        axes.axhline(level, color="#666666", linestyle=line, label=name)
    axes.set_xscale("log")
    axes.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    axes.minorticks_off()
    axes.set_xlabel(f"ε at δ = {FAILURE:g}")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _error(scores: Sequence[float]) -> float:
    """The standard error of a mean."""
    return statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0


def print_table(found: Mapping[str, Any]) -> None:
    """Mean and standard error, a column to each ε."""
    table = Table("way", *(f"ε = {epsilon:g}" for epsilon in EPSILONS))
    for way, look in LOOKS.items():
        scores = [of(found, f"{way}/{epsilon:g}") for epsilon in EPSILONS]
        cells = [f"{100 * statistics.mean(s):.1f} ± {100 * _error(s):.1f}" for s in scores]
        table.add_row(look.name, *cells)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/private-study"), help="folder of the results")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--score-on", choices=("test", "validation"), default="test")
    add("--cache", type=Path, default=default_cache(), help="folder for what pip fetches")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    found = study(options)
    print_table(found)
    path = options.out / "accuracy.png"
    draw(found).savefig(path, dpi=150)
    console.print(f"  wrote {path} and {options.out / 'study.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
