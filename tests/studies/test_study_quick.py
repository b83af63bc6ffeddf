"""The reduced study, run as users run it: what it finds beyond two standard errors is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import studies  # noqa: F401  # makes the demo's modules importable
from studies.paper.cells import Found
from studies.paper.parts import accuracy, composition, forgetting, influence
from studies.paper.report.accuracy import scores
from studies.paper.report.composition import values
from studies.paper.report.summary import auc, beyond, paired

ROOT = Path(__file__).parents[2]
SET = "mnist"


def _run(folder: Path) -> str:
    command = [sys.executable, "-m", "studies.paper", "--preset", "quick"]
    command += ["--work", str(folder / "work"), "--out", str(folder / "pages")]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    output = _run(folder)
    assert f"wrote {folder / 'pages' / 'README.md'}" in output
    return folder


@pytest.fixture(scope="module")
def found(ran: Path) -> Found:
    results = json.loads((ran / "pages" / "results.json").read_text(encoding="utf-8"))
    return Found(results["cells"])


pytestmark = pytest.mark.slow


def test_every_part_ran(found: Found, ran: Path) -> None:
    parts = {cell["part"] for cell in found.cells.values()}
    assert parts >= {accuracy.PART, composition.PART, forgetting.PART, forgetting.ATTACK}
    assert parts >= {"privacy", influence.PART, accuracy.MEMORY}
    page = (ran / "pages" / "README.md").read_text(encoding="utf-8")
    assert "## What did not hold" in page


def test_a_second_run_has_nothing_to_do(ran: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (ran / "work").rglob("*.json")}
    began = time.perf_counter()
    _run(ran)
    assert time.perf_counter() - began < 90
    assert {path: path.stat().st_mtime_ns for path in (ran / "work").rglob("*.json")} == before


def test_the_square_loss_is_better_for_tangent_models(found: Found) -> None:
    square, entropy = (scores(found, SET, "taft-1", loss) for loss in ("square", "cross-entropy"))
    assert beyond(paired(square, entropy))


def test_the_lossless_composition_loses_nothing(found: Found) -> None:
    whole = values(found, SET, "iid", "exact", 1, "lossless")
    lossless = values(found, SET, "iid", "exact", 3, "lossless")
    assert len(whole) == 3
    # Both are solved to a tolerance, so an image or two of a thousand may change sides.
    assert max(abs(a - b) for a, b in zip(whole, lossless, strict=True)) <= 0.005


def test_training_on_all_is_better_than_the_mean_of_small_shards(found: Found) -> None:
    joint = values(found, SET, "iid", "tangent", 1, "mean")
    assert beyond(paired(joint, values(found, SET, "iid", "tangent", 8, "mean")))


def test_the_attacker_sees_a_shard_before_but_no_more_than_ever_after(found: Found) -> None:
    cells = found.of(forgetting.ATTACK)

    def areas(name: str) -> list[float]:
        return [auc(c["scores"][name]["members"], c["scores"][name]["others"]) for c in cells]

    alone = areas("tangent, one shard alone")
    never = areas("tangent mean, never had it")
    assert areas("tangent mean, forgotten by the ledger") == never  # to the bit
    assert beyond(paired(alone, never))


def test_influence_finds_what_harms_the_validation_images(found: Found) -> None:
    last = [cell["points"][-1] for cell in found.of(influence.PART)]
    random, exact = (
        [point[name]["validation_loss"] for point in last] for name in ("random", "exact")
    )
    assert beyond(paired(random, exact))
