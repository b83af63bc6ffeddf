"""The Typer app and its commands. A command imports what it needs only when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from tangent_ops.cli.audit import audit
from tangent_ops.cli.certify import certify
from tangent_ops.cli.compose import compose
from tangent_ops.cli.evaluate import evaluate
from tangent_ops.cli.export import export
from tangent_ops.cli.finetune import EXAMPLES, finetune
from tangent_ops.cli.forget import forget
from tangent_ops.cli.group import Commands
from tangent_ops.cli.influence import influence
from tangent_ops.cli.inspect import inspect
from tangent_ops.cli.ledger import app as ledger
from tangent_ops.cli.options import grouped
from tangent_ops.cli.predict import predict
from tangent_ops.cli.privacy import privacy
from tangent_ops.cli.profile import profile
from tangent_ops.cli.report import report
from tangent_ops.cli.version import version

app = typer.Typer(
    name="tangent-ops",
    help="Fine-tune vision transformers so that what they learned can be added up, and taken out "
    "again. In order: finetune, compose, evaluate, report, forget, export.",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tangent-ops {version()}")
        raise typer.Exit


@app.callback()
def _tangent_ops(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version, and exit."
        ),
    ] = False,
) -> None:
    pass  # it only holds --version, which is eager


app.command(epilog=EXAMPLES)(grouped(finetune))
app.command()(compose)
app.command()(evaluate)
app.command()(predict)
app.command()(grouped(forget))
app.command()(export)
app.command()(influence)
app.command()(certify)
app.command()(inspect)
app.command()(report)
app.command()(profile)
app.command()(privacy)
app.command()(audit)
app.add_typer(ledger, name="ledger")
