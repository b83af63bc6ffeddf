"""``tangent-ops privacy``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from tangent_ops.cli.messages import errors, fail, need_privacy, say


def privacy(
    path: Annotated[Path, typer.Argument(help="A delta's file, or a ledger's folder.")],
    delta: Annotated[
        float | None,
        typer.Option(help="State epsilon at this delta. Default: the statement's own."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show how much a delta, or all compositions of a ledger, can reveal about one sample.

    Recomputes every epsilon. Exits with 1 if there is no privacy statement, if epsilon is infinite,
    or if a statement claims a smaller one.
    """
    need_privacy()

    from tangent_ops.composition.ledger import Ledger
    from tangent_ops.delta import load_delta
    from tangent_ops.errors import CertificateError
    from tangent_ops.privacy.accounting import check_delta
    from tangent_ops.privacy.parallel_composition import ledger_privacy
    from tangent_ops.privacy.statement import statement_of, written

    with errors():
        if delta is not None:
            check_delta(delta)
        try:
            if path.is_dir():
                found = ledger_privacy(Ledger(path, create=False))
            else:
                found = statement_of(load_delta(path))
                if found is not None:
                    found.verify()
        except CertificateError as error:
            fail(f"{path}: {error}", 1, error)
        if found is None:
            fail(f"{path} has no privacy statement: nothing is promised to its samples", code=1)
    bound = found.epsilon if delta is None else found.epsilon_at(delta)
    if as_json:
        record = {
            "delta": found.delta if delta is None else delta,
            "epsilon": written(bound),
            "ledger" if path.is_dir() else "statement": json.loads(found.to_json()),
        }
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        say(found.describe(delta))
    if math.isinf(bound):
        raise typer.Exit(1)
