"""``tangent-ops compose``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tangent_ops.cli.accuracy_change import measured_change, say_change
from tangent_ops.cli.config import Config
from tangent_ops.cli.messages import counted, errors, fail, hidden, leaves, listed, say
from tangent_ops.cli.next_command import say_next
from tangent_ops.cli.targets import check_new, unwritten

Run = Annotated[Path, typer.Argument(help="The run's folder, made by `tangent-ops finetune`.")]


def compose(
    run: Run,
    how: Annotated[
        Literal["mean", "weights", "least-squares", "head", "lossless", "statistics"] | None,
        typer.Option(
            help="mean: of the deltas. weights: the mean with --weights samples. least-squares: "
            "weights that fit the images of --data. head: the mean, with the head that is best on "
            "top of it for the shards' images. lossless: the optimum on all shards together, from "
            "shards fitted by --method exact and their images. statistics: the same from a run of "
            "--method statistics, without images. Default: mean, or statistics in such a run."
        ),
    ] = None,
    weights: Annotated[
        Literal["uniform", "samples"] | None,
        typer.Option(
            help="Weights of the shards in the mean: equal, or their numbers of images. Default: "
            "as in the last call; uniform in the first."
        ),
    ] = None,
    l2: Annotated[
        str | None,
        typer.Option(
            help="Of statistics: weight of half the squared norm; or auto, by generalised "
            "cross-validation. Default: as in the last call; auto in the first."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Of least-squares: validation images, a folder of images per class."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the composed delta to this file, too.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite that file.")] = False,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Compose the trained shards of a run: their deltas, or their statistics.

    They are kept in the ledger RUN/ledger. A later call adds the shards that were trained since
    then, and drops those that were forgotten. Compositions other than the mean are kept in
    RUN/compositions, until the shards change; `evaluate` shows all side by side.
    """
    from tangent_ops.composition.ridge import SolvedDelta
    from tangent_ops.delta import save_delta
    from tangent_ops.shards import ImageData, Plan, settle, settled_ledger
    from tangent_ops.shards.composing import check_how, compose_run, default_how, former_composition

    with errors():
        rest = None
        if out is not None:
            check_new(out, force, "--out")
            rest = unwritten(out)
        plan = Plan.open(run)
        if how == "weights":
            how, weights = "mean", weights or "samples"
        kind = how or default_how(plan)
        validation = None if data is None else ImageData(str(data), split="validation")
        penalty = _number(l2)
        check_how(plan, kind, penalty, validation)
        before = None if plan.validation is None else former_composition(plan, kind)
        words = "the run may be composed in part; the same command goes on"
        leaves(lambda: words if rest is None else f"{words}; {rest()}")
        settled = settle(plan, weights=weights)
        count = len(settled_ledger(plan))
        delta = None
        if count and (kind != "mean" or out is not None or plan.validation is not None):
            delta = compose_run(
                plan, kind, l2=penalty, data=validation, progress=not hidden(as_json)
            )
        if out is not None:
            if delta is None:
                fail(f"{run} has no trained shard: {out} was not written", 2)
            save_delta(delta, out)
    leaves("the run is composed, but not all was measured and shown")
    change = None
    if delta is not None:
        change = measured_change(plan, before, delta, progress=not hidden(as_json))
    record: dict[str, Any] = {"run": str(plan.path), "composed": count, **asdict(settled)}
    solved = delta if isinstance(delta, SolvedDelta) else None
    if as_json:
        record |= {"how": kind, "delta": None if out is None else str(out)}
        if solved is not None:
            record |= {"l2": solved.l2, "condition": solved.condition, "loss": solved.loss}
        record["accuracy"] = change
        typer.echo(json.dumps(record, indent=2))
        return
    say(
        listed(
            f"{counted(count, 'shard')} composed",
            {
                "added": len(settled.added),
                "dropped": len(settled.forgotten),
                "not trained yet": len(settled.missing),
            },
        )
    )
    if solved is not None:
        chosen = "by generalised cross-validation" if plan.l2 is None else "as given"
        say(f"solved with l2 = {solved.l2:g}, {chosen}")
    if out is not None:
        say(f"wrote {out}")
    say_change(change)
    if count:
        say_next("evaluate", run, plan)


def _number(l2: str | None) -> float | str | None:
    if l2 is None:
        return None
    try:
        return float(l2)
    except ValueError:
        return l2
