"""The study from end to end: a tiny one in this process, and the preset `quick` as users run it.

`quick` has the real weights and images; its findings beyond two standard errors are asserted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
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
from studies.paper.parts import accuracy, composition, context, forgetting, influence, privacy
from studies.paper.presets import (
    PRESETS,
    Accuracy,
    Composition,
    Forgetting,
    Influence,
    Preset,
    Privacy,
)
from studies.paper.report.accuracy import scores
from studies.paper.report.composition import values
from studies.paper.report.summary import auc, beyond, paired

ROOT = Path(__file__).parents[2]
CLASSES = 3
TINY = Preset(
    Accuracy(("tiny",), ("nlft-1", "taft-1"), (), (), train=24, validation=12, epochs=1),
    Composition(("tiny",), ("iid",), (1, 4), (1, 3), (), 12, 12, train=24, validation=12, epochs=1),
    Forgetting("tiny", 4, (0, 2)),
    Privacy("tiny", (3.0,), 1e-3, 12, 48, 12, expected=16, steps=2),
    Influence("tiny", train=12, validation=12, removed=(2,)),
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
    model = VisionTransformer(embed_dim=16, depth=2, num_heads=2, global_pool="token", **options)
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
        patch.setattr("studies.paper.tokens.load_model", _model)
        patch.setattr(context, "load_model", _model)
        patch.setattr(cells, "ProcessPoolExecutor", ThisProcess)
        # Tighter tolerances: no prediction of three hundred may change.
        patch.setattr(composition, "FIT_TOLERANCE", 1e-3)
        patch.setattr(composition, "COMPOSE_TOLERANCE", 1e-4)
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


def _areas(found: Found, name: str) -> list[float]:
    """Areas under the ROC curves of the attack on a model, for each seed."""
    cells = [cell["scores"][name] for cell in found.of(forgetting.ATTACK)]
    return [auc(cell["members"], cell["others"]) for cell in cells]


@pytest.fixture(params=["tiny", pytest.param("quick", marks=pytest.mark.long)])
def either(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_every_part_ran(either: Path) -> None:
    parts = {cell["part"] for cell in _found(either)[0].cells.values()}
    assert parts == {
        *(accuracy.PART, accuracy.MEMORY, composition.PART, forgetting.PART, forgetting.ATTACK),
        *(privacy.PART, influence.PART),
    }
    page = (either / "pages" / "README.md").read_text(encoding="utf-8")
    assert "## What did not hold" in page


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


def test_the_lossless_composition_loses_nothing(either: Path) -> None:
    found, images = _found(either)
    whole = values(found, images, "iid", "exact", 1, "lossless")
    lossless = values(found, images, "iid", "exact", 3, "lossless")
    assert len(whole) >= 2
    # Both are solved to a tolerance, so an image or two of a thousand may change sides.
    assert max(abs(a - b) for a, b in zip(whole, lossless, strict=True)) <= 0.005


def test_forgotten_by_the_ledger_is_as_if_it_never_had_been(either: Path) -> None:
    found, _ = _found(either)
    forgotten = _areas(found, "tangent mean, forgotten by the ledger")
    assert forgotten == _areas(found, "tangent mean, never had it")  # to the bit
    assert len(forgotten) >= 2


@pytest.mark.long
def test_findings_of_the_quick_preset(quick: Path) -> None:
    found, images = _found(quick)
    square, entropy = (scores(found, images, "taft-1", x) for x in ("square", "cross-entropy"))
    assert beyond(paired(square, entropy))
    # Training on all images is better than the mean of small shards.
    joint = values(found, images, "iid", "tangent", 1, "mean")
    assert beyond(paired(joint, values(found, images, "iid", "tangent", 8, "mean")))
    # The attacker sees a shard before it is forgotten, and no more than ever after.
    never = _areas(found, "tangent mean, never had it")
    assert beyond(paired(_areas(found, "tangent, one shard alone"), never))
    # Influence finds what harms the validation images.
    last = [cell["points"][-1] for cell in found.of(influence.PART)]
    random, exact = (
        [point[name]["validation_loss"] for point in last] for name in ("random", "exact")
    )
    assert beyond(paired(random, exact))
