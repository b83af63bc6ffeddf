"""``tangent-ops profile``."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tangent_ops.cli.messages import leaves


def profile(
    model: Annotated[
        str, typer.Option(help="A timm model; its weights are random.")
    ] = "vit_base_patch16_224",
    batch: Annotated[int, typer.Option(help="Images per step.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16 or fp16, for weights, deltas and images.")
    ] = "fp32",
    against: Annotated[
        list[str] | None,
        typer.Option(help="A rival: torch-jvp or finetune. Repeat for more. Default: both."),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="forward: a pass under no_grad. train: forward, loss, backward, zero_grad."
        ),
    ] = "train",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda if there is one.")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(help="Train the last K blocks, norm and head. Default: all.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of steps to time, and to profile.")] = 5,
    warmup: Annotated[int, typer.Option(help="Steps before these.")] = 2,
    out: Annotated[
        Path, typer.Option(help="Folder for traces, profile.json and report.html.")
    ] = Path("out/profile"),
) -> None:
    """Show where a linearized model's time and memory go, beside its rivals.

    Runs torch.profiler on the linearized model and on each rival, prints time by family of
    operations, and writes Chrome traces (for ui.perfetto.dev), profile.json and report.html.
    """
    # Otherwise Kineto, which torch.profiler uses, logs every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    errors = Console(stderr=True)
    # torch's own: it scripts its forward-mode decompositions at the first dual tensor.
    warnings.filterwarnings("ignore", message=r"`torch\.jit")

    from tangent_ops.cli.profile_options import check
    from tangent_ops.errors import ArgumentError
    from tangent_ops.profiling.profile import compare, units
    from tangent_ops.profiling.report import print_table, write_report

    try:
        settings = check(
            model=model,
            batch=batch,
            dtype=dtype,
            against=against or (),
            mode=mode,
            device=device,
            out=out,
            steps=steps,
            warmup=warmup,
            blocks=blocks,
        )
    except ArgumentError as error:
        errors.print(
            f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(2) from error

    leaves(f"{out} may hold some of its files")

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("", total=units(settings))
        comparison = compare(
            settings, lambda stage: progress.update(task, advance=1, description=stage)
        )
    console = Console()
    print_table(comparison, console)
    for path in write_report(comparison):
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)
    if comparison.ours.error is not None:
        raise typer.Exit(1)
