"""``tangent-ops export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tangent_ops.cli.chosen import OneDelta, chosen
from tangent_ops.cli.compose import Run
from tangent_ops.cli.config import Config
from tangent_ops.cli.messages import errors, leaves, say
from tangent_ops.cli.targets import check_new, unwritten


def export(
    run: Run,
    file: Annotated[
        Path | None,
        typer.Argument(
            help="Write the composed model to this .pt2 file, a program of plain PyTorch."
        ),
    ] = None,
    task_vector: Annotated[
        Path | None,
        typer.Option(
            help="Write the full composed delta to this .safetensors file, as a task vector."
        ),
    ] = None,
    delta: OneDelta = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files.")] = False,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Write the composed model for PyTorch without this library, or for other tools.

    To run it: torch.export.load("model.pt2").module()(images), with a batch of any size. Prepare
    the images as `tangent-ops inspect RUN` shows.
    """
    from tangent_ops.errors import ArgumentError
    from tangent_ops.model.export import export_program, save_task_vector
    from tangent_ops.shards import Plan

    targets = [path for path in (file, task_vector) if path is not None]
    with errors():
        if not targets:
            raise ArgumentError("give a .pt2 file to write, or --task-vector FILE, or both")
        for path, option in ((file, "FILE"), (task_vector, "--task-vector")):
            if path is not None:
                check_new(path, force, option)
        leaves(unwritten(*targets))
        plan = Plan.open(run)
        tangent, what = chosen(plan, None, delta, False)
        if task_vector is not None:
            save_task_vector(tangent, task_vector)
        if file is not None:
            export_program(tangent, file, input_size=tuple(plan.anchor_info.input["input_size"]))
    if as_json:
        typer.echo(json.dumps({"model": what, "files": [str(path) for path in targets]}, indent=2))
    else:
        for path in targets:
            say(f"wrote {path} ({what})")
