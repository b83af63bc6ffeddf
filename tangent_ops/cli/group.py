"""The group of all commands: it knows which one runs, and what to print after Ctrl-C."""

from __future__ import annotations

from typing import Any

import typer
import typer.core

from tangent_ops.cli.messages import INTERRUPTED, fail, running


class Commands(typer.core.TyperGroup):
    """Ends a command that does not catch Ctrl-C itself, as while torch is imported."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        running.set(found[1])
        return found

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            fail("interrupted: nothing was written", INTERRUPTED, error)
