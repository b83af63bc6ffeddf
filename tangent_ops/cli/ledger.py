"""``tangent-ops ledger``: the commands of a ledger."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tangent_ops.cli.group import Commands
from tangent_ops.cli.messages import errors, leaves, say
from tangent_ops.cli.targets import check_new, unwritten

if TYPE_CHECKING:
    from tangent_ops.composition.ledger import Ledger, StatisticsLedger

app = typer.Typer(
    cls=Commands,
    help="Keep the deltas of many shards in a folder, with their weighted mean, or their "
    "statistics, with the sum. Any shard can be forgotten, exactly and for good.",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(help="The ledger's folder.")]
Shard = Annotated[str, typer.Argument(help="The shard's id: a name of your choice.")]


@app.command()
def add(
    folder: Annotated[Path, typer.Argument(help="The ledger's folder; made if it does not exist.")],
    shard: Shard,
    file: Annotated[
        Path,
        typer.Argument(help="The shard's delta or statistics, from save_delta or save_statistics."),
    ],
    weight: Annotated[
        float | None, typer.Option(help="A delta's weight in the mean. Default: 1.")
    ] = None,
    meta: Annotated[
        list[str] | None,
        typer.Option(help="key=value, shown by list. Repeat for more."),
    ] = None,
) -> None:
    """Add a shard's delta, or its statistics."""
    from tangent_ops.composition.ledger import Ledger, StatisticsLedger
    from tangent_ops.composition.statistics_file import holds_statistics, load_statistics
    from tangent_ops.delta import load_delta
    from tangent_ops.errors import ArgumentError

    with errors():
        pairs = [pair.partition("=") for pair in meta or ()]
        for pair, (key, equals, _) in zip(meta or (), pairs, strict=True):
            if not key or not equals:
                raise ArgumentError(f"--meta {pair}: expected key=value")
        about = {key: value for key, _, value in pairs}
        words = {True: "is in the ledger", False: "is not in it: the same command adds it"}
        leaves(lambda: f"{shard} {words[_size(folder, shard) is not None]}")
        # Files are read first: an error comes before a ledger is made.
        if holds_statistics(file):
            statistics = load_statistics(file)
            if weight is not None:
                raise ArgumentError("--weight is for deltas: statistics are added up")
            StatisticsLedger(folder).add(shard, statistics, about)
        else:
            delta = load_delta(file)
            Ledger(folder).add(shard, delta, 1.0 if weight is None else weight, about)
    say(f"added {shard}")


@app.command()
def forget(
    folder: Folder,
    shard: Shard,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild", help="Sum the others again: this shard's file is damaged or gone."
        ),
    ] = False,
    samples: Annotated[
        Path | None,
        typer.Option(help="A file of statistics: forget only its samples, not the whole shard."),
    ] = None,
) -> None:
    """Remove a shard from the mean or sum, and erase it; its id stays in the history."""
    from tangent_ops.composition.ledger import StatisticsLedger
    from tangent_ops.errors import ArgumentError

    with errors():
        ledger = _open(folder)
        size = _size(folder, shard)
        leaves(lambda: _left_by_forget(folder, shard, size))
        if samples is None:
            ledger.forget(shard, rebuild=rebuild)
        elif rebuild or not isinstance(ledger, StatisticsLedger):
            raise ArgumentError("--samples is for a ledger of statistics, and without --rebuild")
        else:
            ledger.forget_samples(shard, samples)
    say(f"forgot {shard}" if samples is None else f"forgot samples of {shard}")


@app.command(name="list")
def list_shards(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    history: Annotated[
        bool, typer.Option("--history", help="Show what was added and forgotten, and when.")
    ] = False,
) -> None:
    """List the shards."""
    from tangent_ops.composition.ledger import Ledger

    with errors():
        ledger = _open(folder)
        rows = [asdict(row) for row in (ledger.history() if history else ledger.list())]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    size = "weight" if isinstance(ledger, Ledger) else "samples"
    columns = ("when", "what", "shard") if history else ("shard", size, "added", "meta")
    table = Table(*columns)
    for row in rows:
        if not history:
            row[size] = f"{row[size]:g}"
            row["meta"] = ", ".join(f"{key}={value}" for key, value in row["meta"].items())
        table.add_row(*(escape(row[column]) for column in columns))
    Console().print(table)


@app.command()
def verify(
    folder: Folder,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="First replace a damaged sum by a new one.")
    ] = False,
) -> None:
    """Check every file, and compare the sum with a new one."""
    from tangent_ops.composition.ledger import Verified

    with errors():
        ledger = _open(folder)
        if rebuild:
            leaves("no shard was changed; the same command goes on")
            ledger.rebuild()
    with errors(code=1):
        found = ledger.verify()
    size = f"weight {found.weight:g}" if isinstance(found, Verified) else f"{found.samples} samples"
    say(f"shards in order: {found.shards}; {size}; {found.bytes / 1e6:.1f} MB")


@app.command()
def export(
    folder: Folder,
    file: Annotated[Path, typer.Argument(help="The delta file to write.")],
    l2: Annotated[
        float | None,
        typer.Option(
            help="Of statistics: weight of half the squared norm. Default: by generalised "
            "cross-validation."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write the weighted mean of the deltas, or the statistics' optimum, to a delta file."""
    from tangent_ops.composition.ledger import Ledger
    from tangent_ops.delta import save_delta
    from tangent_ops.errors import ArgumentError, LedgerError

    with errors():
        check_new(file, force, "FILE")
        leaves(unwritten(file))
        ledger = _open(folder)
        if isinstance(ledger, Ledger):
            if l2 is not None:
                raise ArgumentError("--l2 is for statistics: this ledger holds deltas")
            composed = ledger.composed()
        else:
            composed = ledger.choose().delta if l2 is None else ledger.solve(l2)
        if composed.meta is None:
            raise LedgerError(
                f"{folder} has a shard of unknown anchor, but a delta file must name its anchor: "
                "add that shard from a delta file"
            )
        save_delta(composed, file)
    say(f"wrote {file}")


def _open(folder: Path) -> Ledger | StatisticsLedger:
    from tangent_ops.composition.ledger import open_ledger

    return open_ledger(folder)


def _size(folder: Path, shard: str) -> float | None:
    """A shard's weight, or number of samples; None if no ledger here has it."""
    from tangent_ops.composition.ledger import Ledger
    from tangent_ops.errors import TangentOpsError

    try:
        ledger = _open(folder)
        rows = ledger.list()
    except TangentOpsError:
        return None
    name = "weight" if isinstance(ledger, Ledger) else "samples"
    return next((getattr(row, name) for row in rows if row.shard == shard), None)


def _left_by_forget(folder: Path, shard: str, before: float | None) -> str:
    """What Ctrl-C left; a change is made completely or not at all."""
    now = _size(folder, shard)
    if now is None:
        return f"{shard} is not in the ledger"
    if now == before:
        return f"{shard} is in the ledger as before: the same command forgets it"
    return f"the samples are out of {shard}, which has {now:g} left"
