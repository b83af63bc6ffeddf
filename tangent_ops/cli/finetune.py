"""``tangent-ops finetune``."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tangent_ops.cli.config import Config
from tangent_ops.cli.messages import errors, fail, hidden, need_privacy, say, tell

if TYPE_CHECKING:
    from tangent_ops.shards import Plan, Recipe, Samples

EXAMPLES = """
Examples:

  tangent-ops finetune photos --public catalogue --out run --shards 6

  tangent-ops finetune photos --out run --by customer --table owners.csv --workers 2

  tangent-ops finetune photos --out run --config taft.toml --executor ray

Then: tangent-ops compose run, tangent-ops evaluate run test-photos
"""


def _option(text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


def finetune(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Argument(
            help="Folder with a folder of images for each class; where a run's images have moved, "
            "the new one: they are compared first."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run's folder; the same command goes on in it.")],
    data_name: Annotated[
        str, _option("Another reader: torch/NAME, hfds/NAME or wds/NAME; DATA is its root.", "Data")
    ] = "",
    split: Annotated[str, _option("Of the data set, or a sub-folder of DATA.", "Data")] = "train",
    model: Annotated[str, _option("A timm model.", "Anchor")] = "vit_base_patch16_224",
    img_size: Annotated[
        int | None, _option("Side of its images in pixels. Default: the model's.", "Anchor")
    ] = None,
    pretrained: Annotated[
        bool, _option("Fetch timm's published weights.", "Anchor", "--pretrained/--no-pretrained")
    ] = True,
    weights: Annotated[
        Path | None, _option("Weights in a .safetensors file, instead.", "Anchor")
    ] = None,
    public: Annotated[
        Path | None,
        _option(
            "Folder of images that will never have to be forgotten: they fit the head first.",
            "Anchor",
        ),
    ] = None,
    anchor: Annotated[
        Path | None, _option("An anchor's file, of another run say, instead of all that.", "Anchor")
    ] = None,
    blocks: Annotated[
        str, _option("Train the last so many blocks, norm and head; or all.", "Training")
    ] = "1",
    rank: Annotated[int | None, _option("Of low-rank deltas.", "Training")] = None,
    basis: Annotated[int, _option("Seed of their fixed factors.", "Training")] = 0,
    method: Annotated[
        Literal["gradient", "exact"],
        _option("By steps; or to the optimum, by conjugate gradients.", "Training"),
    ] = "gradient",
    loss: Annotated[
        Literal["rsl", "cross-entropy"],
        _option("Rescaled square loss, for which forgetting is exact; or another.", "Training"),
    ] = "rsl",
    epochs: Annotated[int, _option("Passes over a shard.", "Training")] = 15,
    lr: Annotated[float, _option("Learning rate at the start.", "Training")] = 1e-4,
    batch_size: Annotated[int, _option("Images in a step.", "Training")] = 32,
    accumulate: Annotated[int, _option("Parts that a step goes through in.", "Training")] = 1,
    optimizer: Annotated[str, _option("adamw or sgd.", "Training")] = "adamw",
    schedule: Annotated[str, _option("cosine, step or constant.", "Training")] = "cosine",
    l2: Annotated[float, _option("Weight of half the squared norm.", "Training")] = 0.0,
    tol: Annotated[
        float, _option("Of the method exact: relative distance left.", "Training")
    ] = 1e-3,
    augment: Annotated[
        bool, _option("timm's training transforms.", "Training", "--augment")
    ] = False,
    grad_checkpointing: Annotated[
        bool, _option("Trade time for memory.", "Training", "--grad-checkpointing")
    ] = False,
    amp: Annotated[bool, _option("bfloat16 autocast.", "Training", "--amp")] = False,
    cache: Annotated[
        bool, _option("Run the frozen blocks once an image.", "Training", "--cache/--no-cache")
    ] = True,
    seed: Annotated[int, _option("Of all that is drawn.", "Training")] = 0,
    shards: Annotated[int, _option("How many, by the hash of an image's path.", "Shards")] = 1,
    proportions: Annotated[
        str | None, _option("Of their sizes: 5,1,1 for three.", "Shards")
    ] = None,
    by: Annotated[
        str, _option("hash; class; or a column of --table, customer say.", "Shards")
    ] = "hash",
    table: Annotated[
        Path | None,
        _option("CSV with a column `sample`, the path in DATA, and others.", "Shards"),
    ] = None,
    label: Annotated[
        str | None,
        _option("Column that images are forgotten by. Default: that of --by.", "Shards"),
    ] = None,
    allow_overlap: Annotated[
        bool, _option("Let shards share images; the plan records it.", "Shards", "--allow-overlap")
    ] = False,
    executor: Annotated[
        Literal["local", "ray"], _option("Where shards are trained.", "Machines")
    ] = "local",
    workers: Annotated[
        int | None, _option("Shards at a time. Default: GPUs, or cores for them.", "Machines")
    ] = None,
    threads: Annotated[int, _option("Of a shard's process.", "Machines")] = 1,
    retries: Annotated[int, _option("Of a shard whose process died.", "Machines")] = 3,
    address: Annotated[str | None, _option("Of a Ray cluster.", "Machines")] = None,
    dp_epsilon: Annotated[
        float | None, _option("Train with (epsilon, delta)-differential privacy.", "Privacy")
    ] = None,
    dp_delta: Annotated[float | None, _option("Its delta. Default: 1e-5.", "Privacy")] = None,
    dp_clip: Annotated[float, _option("Bound of an image's gradient.", "Privacy")] = 1.0,
    dp_batch_size: Annotated[float, _option("Expected images in a step.", "Privacy")] = 256.0,
    dp_steps: Annotated[int, _option("Steps, in place of epochs.", "Privacy")] = 100,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for losses by epoch, for TensorBoard.")
    ] = None,
    config: Config = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Fine-tune a tangent model on shards of your images, each apart from the others.

    Every shard becomes a delta: `compose` adds them up, `forget` takes one out. Shards that are
    trained already are skipped, so after Ctrl-C, or a crash, the same command goes on.
    """
    from tangent_ops.cli.training import check_tensorboard

    sources = {p.name: context.get_parameter_source(p.name or "") for p in context.command.params}
    given = [
        name for name, source in sources.items() if name and source and source.name != "DEFAULT"
    ]
    if dp_epsilon is not None:
        need_privacy()
        dp_delta = 1e-5 if dp_delta is None else dp_delta
    check_tensorboard(tensorboard)
    options = {
        "rank": rank, "basis": basis, "method": method, "loss": loss, "epochs": epochs, "lr": lr,
        "batch_size": batch_size, "accumulate": accumulate, "optimizer": optimizer,
        "schedule": schedule, "l2": l2, "tol": tol, "augment": augment, "amp": amp,
        "grad_checkpointing": grad_checkpointing, "cache": cache, "seed": seed,
        "threads": threads, "dp_epsilon": dp_epsilon, "dp_delta": dp_delta, "dp_clip": dp_clip,
        "dp_batch_size": dp_batch_size, "dp_steps": dp_steps,
    }  # fmt: skip

    from tangent_ops.cli.dealing import Dealing, classes_of, described
    from tangent_ops.cli.make_anchor import AnchorOptions, check_model, make_anchor
    from tangent_ops.errors import ArgumentError
    from tangent_ops.shards import ImageData, Plan, Recipe
    from tangent_ops.shards.plan import DATABASE, check_folder
    from tangent_ops.shards.run import check_executor

    with errors():
        recipe = Recipe(blocks=_blocks(blocks), **options)
        source = ImageData(str(data), data_name, split)
        made = AnchorOptions(model, img_size, weights, pretrained, public, anchor, seed)
        _check_alone(given)
        made.check()
        if workers is not None and workers < 1:
            raise ArgumentError(f"--workers {workers}: expected 1 or more")
        if address is not None and executor != "ray":
            raise ArgumentError("--address is for --executor ray: give that, too")
        check_executor(executor, workers, retries, address)
        check_folder(out)
        samples = source.open()
        if not as_json:
            say(described(samples))
        samples.check_classes(str(data))
        assignment, labels = Dealing(shards, proportions, by, table, label).deal(samples)
        classes = classes_of(samples)
        check_model(made, recipe, len(classes))
        there = Plan.open(out) if (out / DATABASE).exists() else None
        moved = there is not None and there.data != source.absolute()
        if dry_run:
            if there is not None:
                there.check_same(recipe, samples, assignment, labels, allow_overlap)
                if moved:
                    there.relocate(source, dry_run=True, progress=not hidden(as_json))
            _show_dry_run(recipe, samples, assignment, there, out, as_json)
            return
        with tempfile.TemporaryDirectory(prefix="tangent-ops-") as scratch:
            path, words = make_anchor(made, out.absolute(), Path(scratch), classes, hidden(as_json))
            if not as_json:
                tell(words)
            plan = Plan.create(
                out,
                anchor=path,
                data=source,
                recipe=recipe,
                assignment=assignment,
                labels=labels,
                public=None if public is None else ImageData(str(public)),
                allow_overlap=allow_overlap,
                progress=not hidden(as_json),
            )
        if moved and there is not None and not as_json:
            tell(f"the run's images, of {there.data.root}, are read in {plan.data.root} now")
        _train(plan, samples, executor, workers, retries, address, tensorboard, as_json)


def _train(
    plan: Plan,
    samples: Samples,
    executor: str,
    workers: int | None,
    retries: int,
    address: str | None,
    tensorboard: Path | None,
    as_json: bool,
) -> None:
    from tangent_ops.cli.training import watching
    from tangent_ops.shards import run_shards

    todo = sum(shard.job is not None and not shard.done for shard in plan.shards())
    alone = executor == "local" and todo == 1  # then its worker shows bars
    try:
        with watching(todo, tensorboard, quiet=alone or hidden(as_json)) as event:
            report = run_shards(
                plan,
                executor,
                workers=workers,
                retries=retries,
                address=address,
                progress=alone and not hidden(as_json),
                on_done=event,
            )
    except KeyboardInterrupt:
        rows = [shard for shard in plan.shards() if shard.job is not None]
        done = sum(shard.done for shard in rows)
        fail(f"interrupted: {done} of {len(rows)} shards are done; the same command goes on", 130)
    statement = None if plan.recipe.dp_epsilon is None else _statement(plan)
    if as_json:
        record: dict[str, Any] = {
            "run": str(plan.path),
            "classes": samples.counts(),
            "passed_over": list(samples.passed_over),
            "trained": report.trained,
            "skipped": report.skipped,
            "empty": report.empty,
            "failed": report.failed,
            "seconds": report.seconds,
        }
        if statement is not None:
            record["privacy"] = json.loads(statement.to_json())
        typer.echo(json.dumps(record, indent=2))
    else:
        say(
            f"{len(report.trained)} shards trained in {report.seconds:.1f} s, "
            f"{len(report.skipped)} were there, {len(report.empty)} are empty, "
            f"{len(report.failed)} failed"
        )
        for shard, why in report.failed.items():
            say(f"  {shard}: {why}")
        if statement is not None:
            say(str(statement))
        if not report.failed:
            say(f"next: tangent-ops compose {plan.path}")
    if report.failed:
        raise typer.Exit(1)


def _statement(plan: Plan) -> Any:
    """Of all compositions of what is trained; None if nothing is."""
    from tangent_ops.privacy.parallel_composition import ledger_privacy
    from tangent_ops.shards import check_settled, settle

    settle(plan)
    ledger = check_settled(plan)
    return ledger_privacy(ledger) if len(ledger) else None


def _check_alone(given: list[str]) -> None:
    """Raise ArgumentError for options that would be passed over."""
    from tangent_ops.errors import ArgumentError

    private = [name for name in given if name.startswith("dp_")]
    if private and "dp_epsilon" not in given:  # training that only looks private
        option = private[0].replace("_", "-")
        raise ArgumentError(f"--{option} is for a private fit: give --dp-epsilon, too")
    made = [name for name in ("model", "img_size", "pretrained") if name in given]
    if made and "anchor" in given:
        option = made[0].replace("_", "-")
        raise ArgumentError(f"--anchor is a whole model: leave --{option} out")


def _blocks(value: str) -> int | None:
    from tangent_ops.errors import ArgumentError

    if value == "all":
        return None
    if not value.isdecimal():
        raise ArgumentError(f"--blocks {value}: expected a number of blocks, or all")
    return int(value)


def _show_dry_run(
    recipe: Recipe,
    samples: Samples,
    assignment: dict[str, list[str]],
    there: Plan | None,
    out: Path,
    as_json: bool,
) -> None:
    listed = [(name, len(ids), False) for name, ids in assignment.items()]
    if there is not None:  # perhaps some were forgotten
        listed = [(shard.name, shard.samples, shard.done) for shard in there.shards()]
    rows = []
    for name, count, done in listed:
        per_epoch = math.ceil(count / recipe.batch_size)
        steps = recipe.epochs * per_epoch if recipe.dp_epsilon is None else recipe.dp_steps
        exact = recipe.method == "exact"
        rows.append(
            {
                "shard": name,
                "samples": count,
                "steps": None if exact else steps,
                "done": done,
            }
        )
    if as_json:
        record = {
            "run": str(out),
            "classes": samples.counts(),
            "passed_over": list(samples.passed_over),
            "recipe": recipe.to_dict(),
            "shards": rows,
        }
        typer.echo(json.dumps(record, indent=2))
        return
    table = Table("shard", "samples", "steps")
    for row in rows[:50]:
        steps = "to the optimum" if row["steps"] is None else str(row["steps"])
        if row["done"] or not row["samples"]:
            steps = "none: it is trained" if row["done"] else "none: it is empty"
        table.add_row(escape(row["shard"]), str(row["samples"]), steps)
    todo = sum(not row["done"] and row["samples"] > 0 for row in rows)
    Console().print(table)
    more = f" ({len(rows) - 50} more not shown)" if len(rows) > 50 else ""
    say(f"{todo} of {len(rows)} shards would be trained into {out}{more}; nothing was written")
