"""The study from end to end: a tiny one in this process, and the preset `quick` as users run it.

`tiny` has every method of the preset `gpu`, `quick` the real weights, images and processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import generator, shaken
from timm.models.vision_transformer import VisionTransformer

import studies  # noqa: F401  # makes the demo's modules importable
from studies.paper import __main__ as command
from studies.paper import cells
from studies.paper.cells import Found
from studies.paper.data.pool import Pool, Source
from studies.paper.data.sets import SETS, ImageSet
from studies.paper.methods import METHODS
from studies.paper.parts import (
    accuracy,
    composition,
    context,
    forgetting,
    influence,
    membership,
    privacy,
    soups,
)
from studies.paper.parts.accuracy import Regime
from studies.paper.parts.privacy import ImageSizes
from studies.paper.planned import RUNS
from studies.paper.presets import PRESETS, Preset
from studies.paper.report.composition import scores
from studies.paper.report.summary import gain

ROOT = Path(__file__).parents[2]
CLASSES = 3
DEPTH = 2  # of the tiny model
# Every method of the preset `gpu`, as it runs them; with blocks as the tiny model has them.
(FULL,) = PRESETS["gpu"].accuracy.regimes
TINY = Preset(
    accuracy.Sizes(("tiny",), (Regime("tiny", 24, 12, 1, 8, FULL.square, FULL.entropy),)),
    composition.Sizes(("tiny",), (3,), rounds=(3,), public=12, train=24, validation=12, epochs=2),
    soups.Sizes(("tiny",), ("tiny",), (3,), public=12, train=24, validation=12, epochs=1),
    forgetting.Sizes("tiny", 12, 24, 12, 4, (0, 2), (1, 4)),
    membership.Sizes("tiny", 12, 12, 16, 12, 3, 4),
    privacy.Sizes(
        {"tiny": ImageSizes(12, 48, 12, 16, 2, 1)},
        (3.0,),
        (3.0,),
        1e-3,
        2,
        (4, 8),
        (8, 16),
        (2, 4),
        (4, 8),
    ),
    influence.Sizes(("tiny",), public=12, train=20, validation=12, removed=(2,), checked=4),
    seeds=(0, 1),
)


def _command(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "studies.paper", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=3600,  # so much only on a busy machine
        check=False,
    )


class ThisProcess:
    """Replaces the pool of processes, which starts slower than the tiny study runs."""

    submitted = 0

    def __init__(self, *options: Any) -> None: ...

    def __enter__(self) -> ThisProcess:
        return self

    def __exit__(self, *error: object) -> None: ...

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        ThisProcess.submitted += 1
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future


def _model(cache: Path) -> VisionTransformer:
    options: dict[str, Any] = {"img_size": 98, "patch_size": 49, "num_classes": 0}
    torch.manual_seed(0)
    model = VisionTransformer(
        embed_dim=16, depth=DEPTH, num_heads=2, global_pool="token", **options
    )
    shaken(model)
    return model.eval()


def _images(cache: Path) -> Pool:
    """Noise around a grey for each class."""
    targets = torch.arange(400) % CLASSES
    noise = torch.randint(0, 215, (400, 1, 8, 8), generator=generator())
    pixels = (noise + 20 * targets.view(-1, 1, 1, 1)).to(torch.uint8)
    return Pool("tiny", pixels, targets, [f"class {index}" for index in range(CLASSES)])


@pytest.fixture(scope="module")
def run_tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """Runs the tiny study; gives the folder with `work` and `pages`."""
    folder = tmp_path_factory.mktemp("tiny")
    arguments = ["--preset", "tiny", "--work", str(folder / "work")]
    arguments += ["--out", str(folder / "pages"), "--cache", str(folder / "cache")]

    def run() -> Path:
        assert command.main(arguments) == 0
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        source = Source("none", "none", "0" * 64, "made up")
        patch.setitem(SETS, "tiny", ImageSet(_images, lambda: source, test=300, pool=100))
        for name, method in METHODS.items():
            patch.setitem(METHODS, name, replace(method, depth=min(method.depth, DEPTH)))
        patch.setattr("studies.paper.tokens.load_model", _model)
        patch.setattr(context, "load_model", _model)
        patch.setattr(cells, "ProcessPoolExecutor", ThisProcess)
        yield run


@pytest.fixture(scope="module")
def tiny(run_tiny: Callable[[], Path]) -> Path:
    return run_tiny()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    arguments = ["--preset", "quick", "--work", str(folder / "work")]
    done = _command([*arguments, "--out", str(folder / "pages")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"wrote {folder / 'pages' / 'README.md'}" in done.stdout
    return folder


def _found(folder: Path) -> tuple[Found, str]:
    """The results and the name of their set of images."""
    results = json.loads((folder / "pages" / "results.json").read_text(encoding="utf-8"))
    return Found(results["cells"]), results["configuration"]["forgetting"]["images"]


@pytest.fixture(params=["tiny", "quick"])
def either(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_every_part_ran(either: Path) -> None:
    assert {cell["part"] for cell in _found(either)[0].cells.values()} == {*RUNS}
    page = (either / "pages" / "README.md").read_text(encoding="utf-8")
    assert "## What came out" in page and "## Choices at an edge" in page


def test_a_second_run_has_nothing_to_do(tiny: Path, run_tiny: Callable[[], Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (tiny / "work").rglob("*.json")}
    submitted = ThisProcess.submitted
    run_tiny()
    assert ThisProcess.submitted == submitted > 0
    assert {path: path.stat().st_mtime_ns for path in (tiny / "work").rglob("*.json")} == before


def test_the_command_in_a_process(tmp_path: Path) -> None:
    done = _command(["--pages-only", "--out", str(tmp_path)])
    assert done.returncode == 1
    assert f"there is no {tmp_path / 'results.json'}; run the study first" in done.stderr


def test_lossless_rounds_come_to_the_joint_fit(either: Path) -> None:
    found, images = _found(either)
    count = found.of(composition.PART, images=images)[0]["shards"][0]
    joint = scores(found, images, "joint", "exact", 1)
    lossless = scores(found, images, "by class", "lossless, 8 rounds", count)
    assert joint is not None and lossless is not None
    assert len(joint) >= 2
    # Rounds are few, so an image or two of a hundred may change sides.
    assert abs(gain(joint, lossless).value) <= 0.03
