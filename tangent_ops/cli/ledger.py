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

from tangent_ops.cli.messages import errors, say

if TYPE_CHECKING:
    from tangent_ops.composition.ledger import Ledger

app = typer.Typer(
    help="Keep the deltas of many shards in a folder, with their weighted mean. Any shard can be "
    "forgotten, exactly and for good.",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(help="The ledger's folder.")]
Shard = Annotated[str, typer.Argument(help="The shard's id: a name of your choice.")]


@app.command()
def add(
    folder: Annotated[Path, typer.Argument(help="The ledger's folder; made if it does not exist.")],
    shard: Shard,
    file: Annotated[Path, typer.Argument(help="The shard's delta, as save_delta writes it.")],
    weight: Annotated[float, typer.Option(help="The shard's weight in the mean.")] = 1.0,
    meta: Annotated[
        list[str] | None,
        typer.Option(help="key=value, shown by list. Repeat for more."),
    ] = None,
) -> None:
    """Add a shard's delta."""
    from tangent_ops.composition.ledger import Ledger
    from tangent_ops.delta import load_delta
    from tangent_ops.errors import ArgumentError

    with errors():
        pairs = [pair.partition("=") for pair in meta or ()]
        for pair, (key, equals, _) in zip(meta or (), pairs, strict=True):
            if not key or not equals:
                raise ArgumentError(f"--meta {pair}: expected key=value")
        delta = load_delta(file)  # it may raise: before a ledger is made
        Ledger(folder).add(shard, delta, weight, {key: value for key, _, value in pairs})
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
) -> None:
    """Remove a shard's delta from the mean, and erase it; its id stays in the history."""
    with errors():
        _open(folder).forget(shard, rebuild=rebuild)
    say(f"forgot {shard}")


@app.command(name="list")
def list_shards(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    history: Annotated[
        bool, typer.Option("--history", help="Show what was added and forgotten, and when.")
    ] = False,
) -> None:
    """List the shards."""
    with errors():
        ledger = _open(folder)
        rows = [asdict(row) for row in (ledger.history() if history else ledger.list())]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    columns = ("when", "what", "shard") if history else ("shard", "weight", "added", "meta")
    table = Table(*columns)
    for row in rows:
        if not history:
            row["weight"] = f"{row['weight']:g}"
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
    with errors():
        ledger = _open(folder)
        if rebuild:
            ledger.rebuild()
    with errors(code=1):
        found = ledger.verify()
    say(f"shards in order: {found.shards}; weight {found.weight:g}; {found.bytes / 1e6:.1f} MB")


@app.command()
def export(
    folder: Folder,
    file: Annotated[Path, typer.Argument(help="The delta file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write the weighted mean of the shards to a delta file."""
    from tangent_ops.delta import save_delta
    from tangent_ops.errors import ArgumentError, LedgerError

    with errors():
        composed = _open(folder).composed()
        if composed.meta is None:
            raise LedgerError(
                f"{folder} has a shard of unknown anchor, but a delta file must name its anchor: "
                "add that shard from a delta file"
            )
        if file.exists() and not force:
            raise ArgumentError(f"{file} exists: give another name, or --force to overwrite it")
        save_delta(composed, file)
    say(f"wrote {file}")


def _open(folder: Path) -> Ledger:
    from tangent_ops.composition.ledger import Ledger

    return Ledger(folder, create=False)
