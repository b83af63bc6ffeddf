"""``tangent-ops report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tangent_ops.cli.compose import Run
from tangent_ops.cli.config import Config
from tangent_ops.cli.image_options import Reader, Split
from tangent_ops.cli.messages import errors, hidden, leaves, say
from tangent_ops.cli.targets import unwritten


def report(
    run: Run,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Labelled images, a folder of images per class. Default: the validation images "
            "that finetune was given."
        ),
    ] = None,
    data_name: Reader = "",
    split: Split = "validation",
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite that file.")] = False,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    config: Config = None,
) -> None:
    """Write what a run holds, how accurate it is and what was forgotten, as one HTML page.

    Shards with some of their images, losses, the accuracy of each composition and without each
    shard, a confusion matrix, the training images that helped and harmed some predictions, the
    history, certificates and privacy. The page needs no other file and loads nothing. It shows
    training images: keep it where these may be seen.
    """
    from tangent_ops.errors import ArgumentError
    from tangent_ops.files import check_target
    from tangent_ops.report import collect, write_page
    from tangent_ops.shards import ImageData, Plan

    with errors():
        check_target(out, "--out")
        if out.exists() and not force:
            raise ArgumentError(f"{out} exists: give another name, or --force to overwrite it")
        leaves(unwritten(out))
        if data is None and data_name:
            raise ArgumentError("--data-name is for the images of --data: give a folder, too")
        plan = Plan.open(run)
        images = None if data is None else ImageData(str(data), data_name, split)
        found = collect(plan, images, progress=not hidden(False))
        size = write_page(found, out)
    say(f"wrote {out} ({size / 1e6:.1f} MB)")
    for remark in found.remarks.values():
        say(remark)
    if show:
        typer.launch(str(out.absolute()))
