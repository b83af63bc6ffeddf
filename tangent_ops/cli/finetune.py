"""``tangent-ops finetune``."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tangent_ops.cli.anchor_options import AnchorOptions
from tangent_ops.cli.assignment import Assignment, classes_of, described
from tangent_ops.cli.config import Config
from tangent_ops.cli.dry_run import show_dry_run
from tangent_ops.cli.machines import HELPS, Machines
from tangent_ops.cli.messages import (
    counted,
    errors,
    fail,
    hidden,
    leaves,
    listed,
    need_privacy,
    say,
    tell,
)
from tangent_ops.cli.method import EXACT_L2, decided
from tangent_ops.cli.next_command import say_next
from tangent_ops.cli.options import Group
from tangent_ops.cli.run_table import histories, show_shards
from tangent_ops.cli.training import check_trackers, watching
from tangent_ops.errors import ArgumentError
from tangent_ops.shards.recipe import ShardRecipe

if TYPE_CHECKING:
    from tangent_ops.shards import ImageData, Plan, Samples


EXAMPLES = """
Examples:

  tangent-ops finetune photos --public catalogue --out run --shards 6

  tangent-ops finetune photos --public catalogue --out run --shards 50 --method statistics

  tangent-ops finetune photos --out run --by customer --table owners.csv --workers 2

  tangent-ops finetune photos --out run --config taft.toml --executor ray

Then: tangent-ops compose run, tangent-ops evaluate run test-photos
"""


def _blocks(value: str) -> int | None:
    if value == "all":
        return None
    if not value.isdecimal():
        raise ArgumentError(f"--blocks {value}: expected a number of blocks, or all")
    return int(value)


def _recipe(**options: Any) -> ShardRecipe:
    if options["dp_epsilon"] is not None:
        need_privacy()
        if options["dp_delta"] is None:
            options["dp_delta"] = 1e-5
    options["method"] = options["method"] or "gradient"  # `decided` chooses it
    if options["l2"] is None:
        options["l2"] = EXACT_L2 if options["method"] == "exact" else 0.0
    return ShardRecipe(**options)


ANCHOR = Group(
    AnchorOptions,
    {
        "Anchor": {
            "model": "Name of a timm model.",
            "img_size": "Side of the images in pixels. Default: the model's own.",
            "pretrained": "Download timm's published weights.",
            "weights": "Weights in a .safetensors file, instead of timm's.",
            "public": "Folder of images that will never have to be forgotten, to train the head on "
            "first, and for the basis of --method statistics.",
            "anchor": "An anchor's file (of another run, say), instead of all these.",
        }
    },
)
RECIPE = Group(
    ShardRecipe,
    {
        "Training": {
            "blocks": "Number of last blocks to train, with norm and head; or all.",
            "rank": "Rank of low-rank deltas. Default: full deltas.",
            "basis": "Seed of the fixed factors of low-rank deltas.",
            "method": "exact: to the optimum. gradient: by steps. statistics: a shard gets no "
            "delta, but sums in a small core, of which `compose` solves for the optimum on all "
            "shards; needs --public. Default: exact; but gradient with --epochs, --lr or another "
            "option of steps, cross-entropy or privacy.",
            "core": "Of --method statistics: rows and columns of each layer's core.",
            "loss": "rsl: the rescaled square loss, which is quadratic.",
            "epochs": "Passes over a shard.",
            "lr": "Learning rate at the start.",
            "batch_size": "Images per step.",
            "accumulate": "Number of parts that a step is computed in, to save memory.",
            "optimizer": "adamw, sgd or momentum.",
            "schedule": "cosine, step or constant.",
            "l2": f"Weight of half the squared norm. Default: {EXACT_L2:g} for exact, 0 for "
            "gradient; for statistics `compose` chooses it.",
            "tol": "Of --method exact: the relative distance that is left.",
            "augment": "Use timm's training transforms.",
            "grad_checkpointing": "Compute blocks again in the backward pass, to save memory.",
            "amp": "Use bfloat16 autocast.",
            "cache": "Run the frozen blocks once per image.",
            "seed": "Seed of all random draws.",
        },
        "Machines": {"threads": "Threads of a shard's process."},
        "Privacy": {
            "dp_epsilon": "Train with (epsilon, delta)-differential privacy.",
            "dp_delta": "The delta of (epsilon, delta). Default: 1e-5.",
            "dp_clip": "Norm that each image's gradient is clipped to.",
            "dp_batch_size": "Expected number of images per step.",
            "dp_steps": "Number of steps, instead of epochs.",
        },
    },
    texts={"blocks": _blocks},
    undecided=frozenset({"method", "l2"}),
    build=_recipe,
)
ASSIGNMENT = Group(
    Assignment,
    {
        "Shards": {
            "shards": "Number of shards; images are assigned by the hash of their path.",
            "proportions": "Relative sizes of the shards: 5,1,1 for three.",
            "by": "Assign images by hash, by class, or by a column of --table, such as customer.",
            "table": "CSV file with a column `sample`, the path in DATA, and others.",
            "label": "Column of labels, to forget images by. Default: that of --by.",
            "allow_overlap": "Let shards share images; the plan records it.",
        }
    },
)


def finetune(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Argument(
            help="Folder with one folder of images per class. If a run's images have moved, give "
            "the new folder: the images are compared first."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run's folder. The same command continues a run.")],
    anchor: Annotated[AnchorOptions, ANCHOR],
    recipe: Annotated[ShardRecipe, RECIPE],
    assignment: Annotated[Assignment, ASSIGNMENT],
    machines: Annotated[Machines, Group(Machines, {"Machines": HELPS})],
    data_name: Annotated[
        str,
        typer.Option(
            help="Use another reader: torch/NAME, hfds/NAME or wds/NAME; DATA is its root.",
            rich_help_panel="Data",
        ),
    ] = "",
    split: Annotated[
        str,
        typer.Option(
            help="Split of the data set; a sub-folder of DATA, if there is one.",
            rich_help_panel="Data",
        ),
    ] = "train",
    validation: Annotated[
        Path | None,
        typer.Option(
            help="Folder of other labelled images, on which accuracies are measured. The run "
            "remembers it. No delta depends on it. Each shard's process reads these images once.",
            rich_help_panel="Data",
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(help="Folder for TensorBoard files: losses and accuracies by epoch."),
    ] = None,
    wandb: Annotated[
        str | None, typer.Option(help="Project of Weights & Biases, for the same values.")
    ] = None,
    config: Config = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Fine-tune a tangent model on each shard of your images, separately.

    Every shard gets a delta, or statistics: `compose` adds them up, `forget` removes one. Shards
    that are done are skipped, so after Ctrl-C or a crash the same command continues.
    """
    sources = {p.name: context.get_parameter_source(p.name or "") for p in context.command.params}
    given = [
        name for name, source in sources.items() if name and source and source.name != "DEFAULT"
    ]
    check_trackers(tensorboard, wandb)

    from tangent_ops.cli.make_anchor import check_model, check_public, make_anchor
    from tangent_ops.shards import ImageData, Plan
    from tangent_ops.shards.disjoint import check_private
    from tangent_ops.shards.rows import check_names, rows_of
    from tangent_ops.shards.run_folder import DATABASE, check_folder

    leaves(lambda: _left(out))
    with errors():
        source = ImageData(str(data), data_name, split)
        anchor = replace(anchor, seed=recipe.seed)
        _check_alone(given)
        there = Plan.open(out) if (out / DATABASE).exists() else None
        recipe = decided(recipe, given, there)
        anchor.check(basis=recipe.method == "statistics")
        machines.check()
        check_folder(out)
        samples = source.open()
        if not as_json:
            say(described(samples))
        samples.check_classes(str(data))
        dealt, labels = assignment.deal(samples)
        check_private(recipe, dealt, assignment.allow_overlap)
        classes = classes_of(samples)
        check_model(anchor, recipe, len(classes))
        measured = _validation(validation, samples)
        moved = there is not None and there.data != source.absolute()
        if there is not None:
            there.check_same(recipe, samples, dealt, labels, assignment.allow_overlap)
        check_names(dealt)
        rows_of(samples, dealt, labels, len(classes))  # raises for names that do not print
        check_public(anchor, samples)
        if dry_run:
            if there is not None and moved:
                there.relocate(source, dry_run=True, progress=not hidden(as_json))
            show_dry_run(
                anchor,
                recipe,
                source,
                samples,
                dealt,
                there,
                out,
                measured,
                machines.workers,
                as_json,
            )
            return
        with tempfile.TemporaryDirectory(prefix="tangent-ops-") as scratch:
            path, words = make_anchor(
                anchor, out.absolute(), Path(scratch), classes, hidden(as_json)
            )
            if not as_json:
                tell(words)
            plan = Plan.create(
                out,
                anchor=path,
                data=source,
                recipe=recipe,
                assignment=dealt,
                labels=labels,
                public=None if anchor.public is None else ImageData(str(anchor.public)),
                validation=measured,
                allow_overlap=assignment.allow_overlap,
                progress=not hidden(as_json),
            )
        if moved and there is not None and not as_json:
            tell(f"the run's images, of {there.data.root}, are read in {plan.data.root} now")
        _train(plan, samples, machines, {"tensorboard": tensorboard, "wandb": wandb}, out, as_json)


def _train(
    plan: Plan,
    samples: Samples,
    machines: Machines,
    trackers: dict[str, Any],
    out: Path,
    as_json: bool,
) -> None:
    from tangent_ops.shards import run_shards

    todo = sum(shard.job is not None and not shard.done for shard in plan.shards())
    alone = machines.executor == "local" and todo == 1  # then its worker shows bars
    bars = alone and not hidden(as_json)
    unmeasured: set[str] = set()
    try:
        with watching(todo, quiet=bars or as_json, **trackers) as event:

            def on_done(shard: str, found: dict[str, Any]) -> None:
                unmeasured.update({found["unmeasured"]} if "unmeasured" in found else ())
                event(shard, found)

            report = run_shards(plan, **vars(machines), progress=bars, on_done=on_done)
    except KeyboardInterrupt:
        rows = [shard for shard in plan.shards() if shard.job is not None]
        done = sum(shard.done for shard in rows)
        words = f"{done} of {counted(len(rows), 'shard')} done"
        fail(f"interrupted: {words}; the same command goes on", 130)
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
            "shards": histories(plan),
        }
        if statement is not None:
            record["privacy"] = json.loads(statement.to_json())
        typer.echo(json.dumps(record, indent=2))
    else:
        say(
            listed(
                f"{counted(len(report.trained), 'shard')} trained in {report.seconds:.1f} s",
                {
                    "trained before": len(report.skipped),
                    "empty": len(report.empty),
                    "failed": len(report.failed),
                },
            )
        )
        for shard, why in report.failed.items():
            say(f"  {shard}: {why}")
        for why in sorted(unmeasured):
            say(why)
        show_shards(plan)
        if statement is not None:
            say(str(statement))
        if not report.failed:
            say_next("compose", out, plan)
    if report.failed:
        raise typer.Exit(1)


def _left(out: Path) -> str:
    """What Ctrl-C leaves before the shards are trained."""
    from tangent_ops.shards.run_folder import DATABASE

    if not (out / DATABASE).exists():
        return "no shard was trained; the same command begins again"
    return "the shards that are done stay; the same command goes on"


def _statement(plan: Plan) -> Any:
    """The statement of all compositions of the trained shards; None if there are none."""
    from tangent_ops.privacy.parallel_composition import ledger_privacy
    from tangent_ops.shards import check_settled, settle

    settle(plan)
    ledger = check_settled(plan)
    return ledger_privacy(ledger) if len(ledger) else None


def _validation(folder: Path | None, samples: Samples) -> ImageData | None:
    """The validation images that were given: of the classes of the samples, and none of these."""
    from tangent_ops.shards import ImageData
    from tangent_ops.shards.disjoint import VALIDATION, check_apart

    if folder is None:
        return None
    data = ImageData(str(folder), split="validation")
    try:
        found = data.open().with_classes(classes_of(samples))
        check_apart(found, samples, VALIDATION)
    except ArgumentError as error:
        raise ArgumentError(f"--validation {folder}: {error}") from error
    return data


def _check_alone(given: list[str]) -> None:
    """Raise ArgumentError for options that would be ignored."""
    private = [name for name in given if name.startswith("dp_")]
    if private and "dp_epsilon" not in given:  # training would only look private
        option = private[0].replace("_", "-")
        raise ArgumentError(f"--{option} is for a private fit: give --dp-epsilon, too")
    made = [name for name in ("model", "img_size", "pretrained") if name in given]
    if made and "anchor" in given:
        option = made[0].replace("_", "-")
        raise ArgumentError(f"--anchor is a whole model: leave --{option} out")
