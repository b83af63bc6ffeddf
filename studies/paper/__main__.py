"""Run the study, and write what came of it.

    python -m studies.paper --preset cpu

The same command goes on where it was cut off. Results are kept in ``--work``; what is made of them
(pages, plots, raw numbers) goes to ``--out``.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from assets import DemoError, default_cache

from studies.paper.cells import ROOT, SOURCES, kept, run_all
from studies.paper.parts.context import Context
from studies.paper.planned import digest, plan, run, sources
from studies.paper.presets import PRESETS, Preset
from tangent_ops.errors import TangentOpsError

RESULTS = "results.json"


def study(name: str, preset: Preset, work: Path, cache: Path) -> dict[str, Any]:
    """Run all that was not run yet; give everything that the pages are made of."""
    began = time.perf_counter()
    cells = plan(preset)
    known = len(kept(work / "cells", cells, sources).cells)
    context = Context(cache, preset.depths, preset.device)
    for images, _ in preset.depths:
        context.prepared(images)  # here, so that no two processes do
    prepared = time.perf_counter() - began
    found = run_all(
        cells,
        functools.partial(run, context=context),
        work / "cells",
        sources=sources,
        workers=preset.workers,
        threads=preset.threads,
    )
    return {
        "preset": name,
        "configuration": asdict(preset),
        "machine": machine(preset),
        "sources": digest(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "prepare_seconds": prepared,
        "total_seconds": time.perf_counter() - began,
        "found_before": known,
        "cells": found.cells,
    }


def machine(preset: Preset) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name() if preset.device == "cuda" else _processor()
    return {
        "device": name,
        "workers": preset.workers,
        "threads": preset.threads,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def commit() -> str:
    """The checked-out commit, marked if a source differs from it; empty without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    found = git("log", "-1", "--format=%h", "--abbrev=12")
    changed = git("status", "--porcelain", "--", *SOURCES, "studies/paper")
    return f"{found}-dirty" if changed else found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {len(names)} cores"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.paper",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="cpu", help="how much is run")
    add("--work", type=Path, help="folder of the cells (default: out/study/PRESET)")
    add(
        "--out", type=Path, help="folder of the pages (default: docs/study for cpu, else in --work)"
    )
    add("--cache", type=Path, default=default_cache(), help="folder for packages and tokens")
    add("--pages-only", action="store_true", help="write the pages from the results in --out")
    options = parser.parse_args(arguments)
    work = options.work or Path("out") / "study" / options.preset
    # docs/study is of the preset that anybody can run.
    out = options.out or (ROOT / "docs" / "study" if options.preset == "cpu" else work / "pages")
    from studies.paper.report.pages import write_pages  # matplotlib: slow to import

    try:
        if options.pages_only:
            if not (out / RESULTS).is_file():
                raise DemoError(f"--pages-only: there is no {out / RESULTS}; run the study first")
            results = json.loads((out / RESULTS).read_text(encoding="utf-8"))
        else:
            preset = PRESETS[options.preset]
            if preset.device == "cuda" and not torch.cuda.is_available():
                raise DemoError("--preset gpu needs a CUDA device, and torch sees none")
            results = study(options.preset, preset, work, options.cache)
            out.mkdir(parents=True, exist_ok=True)
            path = out / RESULTS
            path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    except (DemoError, TangentOpsError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in write_pages(results, out):
        print(f"wrote {path}")
    minutes = results["total_seconds"] / 60
    print(f"{len(results['cells'])} cells; this run took {minutes:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
