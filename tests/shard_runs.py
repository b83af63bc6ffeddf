"""Small runs: images of noise around a colour per class, and timm's tiny test model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from tangent_ops.shards import ImageData, Plan, ShardRecipe, by_hash, job, save_anchor

OPTIONS = {"num_classes": 4, "img_size": 32}
FAST: dict[str, Any] = {"epochs": 1, "lr": 1e-3, "batch_size": 4}


def image_folder(path: Path, classes: int = 4, each: int = 6, seed: int = 0) -> Path:
    """A folder of images for each class."""
    draw = np.random.default_rng(seed)
    for index in range(classes):
        colour = np.array([(index >> bit & 1) * 120 for bit in range(3)])
        (path / f"class{index}").mkdir(parents=True)
        for number in range(each):
            pixels = (draw.integers(0, 100, (32, 32, 3)) + colour).astype(np.uint8)
            Image.fromarray(pixels).save(path / f"class{index}" / f"{number}.png")
    return path


def anchor_file(path: Path, classes: int = 4) -> Path:
    """The file of timm's test_vit with noise on all weights, the head's included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {**OPTIONS, "num_classes": classes}
        model = timm.create_model("test_vit", **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
    names = [f"class{index}" for index in range(classes)]
    save_anchor(model, path, name="test_vit", options=options, classes=names)
    return path


def create_plan(folder: Path, assignment: Any, run: str = "run", **options: Any) -> Plan:
    """A plan in folder/run for the images and the anchor in the folder."""
    given = {
        "anchor": folder / "anchor.safetensors",
        "data": ImageData(str(folder / "images")),
        "recipe": ShardRecipe(**FAST),
        "progress": False,
    }
    return Plan.create(folder / run, assignment=assignment, **{**given, **options})


def make_plan(folder: Path, shards: int = 3, run: str = "run", **recipe: Any) -> Plan:
    """A plan in folder/run; images and anchor are made in the folder if they are not there."""
    images = folder / "images"
    if not images.exists():
        image_folder(images)
        anchor_file(folder / "anchor.safetensors")
    assignment = by_hash(ImageData(str(images)).open().ids, shards)
    return create_plan(folder, assignment, run, recipe=ShardRecipe(**{**FAST, **recipe}))


def trained(plan: Plan) -> Plan:
    """The plan, after every shard without a delta was trained in this process."""
    threads = torch.get_num_threads()
    for shard in plan.shards():
        if shard.job is not None and not shard.done:
            assert "error" not in job.attempt(str(plan.path), shard.name)
    torch.set_num_threads(threads)
    return plan


def run_here(run, shards, *, on_result, **_) -> None:
    """Stands in for `run_local`, whose workers take seconds to start."""
    for shard in shards:
        on_result(shard, job.attempt(str(run), shard))


def bits(plan: Plan) -> dict[str, str]:
    """SHA-256 of every file among the deltas but the histories, which hold times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(plan.results_path.iterdir())
        if path.suffix != ".json"
    }
