"""The demo's accuracies as a table, from the `results.json` of several seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.stored import RESULTS, BadFile

NEEDED = ("model", "setting", "seed", "torch", "date", "rows")
FOLDER = RESULTS / "demo"
LINES = {
    "anchor": "linear probe, public images (the anchor's head)",
    "probe": "linear probe, all images",
    "ordinary": "ordinary fine-tuning, all images",
    "tangent": "tangent fine-tuning (TAFT-1), all images",
    "shard": "best of the TAFT-1s, each on a shard of private images",
    "composed": "mean of the shards",
    "forgotten": "one shard forgotten",
}


def read_demos(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The runs stored there, by seed.

    Raises:
        BadFile: one is not a demo's `results.json`.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            found.append({name: run[name] for name in NEEDED})
        except (KeyError, TypeError, ValueError) as problem:
            raise BadFile(f"{path} is not a results.json of the demo: {problem}") from None
    return sorted(found, key=lambda run: run["seed"])


def demo_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A line per kind of model, a column per seed, and beneath what was run."""
    if not runs:
        return "Not measured yet."
    cells = [["model", *(f"seed {run['seed']}" for run in runs)]]
    cells.append(["---"] * len(cells[0]))
    cells += [[words, *(_best(run, kind) for run in runs)] for kind, words in LINES.items()]
    table = "\n".join("| " + " | ".join(line) + " |" for line in cells)
    first = runs[0]
    where = f"{first['model']}. {first['setting']}; torch {first['torch']}, {first['date']}"
    return f"{table}\n\n{where}; `make demo ARGS='--seed N'`."


def _best(run: Mapping[str, Any], kind: str) -> str:
    accuracy = max(row["accuracy"] for row in run["rows"] if row["kind"] == kind)
    return f"{100 * accuracy:.1f} %"
