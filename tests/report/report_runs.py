"""Small runs with validation images, by method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shard_runs import FAST, anchor_file, create_plan, image_folder, trained

from tangent_ops.report.run_report import labelled_images
from tangent_ops.shards import ImageData, Plan, Samples, ShardRecipe, by_hash, settle
from tangent_ops.shards.composing import compose_run

RECIPES: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact", "l2": 0.5},
    "statistics": {"method": "statistics", "core": 2},
    "gradient": {**FAST, "epochs": 2},
}


def make_run(folder: Path, method: str, run: str = "", **options: Any) -> Plan:
    """A trained and composed run of three shards, with validation images."""
    if not (folder / "images").exists():
        image_folder(folder / "images")
        image_folder(folder / "public", each=3, seed=7)
        image_folder(folder / "test", each=5, seed=8)
        anchor_file(folder / "anchor.safetensors")
    given = {
        "recipe": ShardRecipe(**RECIPES[method]),
        "public": ImageData(str(folder / "public")),
        "validation": ImageData(str(folder / "test")),
        **options,
    }
    assignment = by_hash(ImageData(str(folder / "images")).open().ids, 3)
    plan = trained(create_plan(folder, assignment, run or method, **given))
    settle(plan)
    if method == "statistics":
        compose_run(plan, "statistics", progress=False)
    return plan


def validation(plan: Plan) -> Samples:
    """The run's validation images, prepared for its anchor."""
    assert plan.validation is not None
    return labelled_images(plan, plan.validation)
