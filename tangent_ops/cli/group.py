"""The group of all commands: it knows which one runs, and what to print after Ctrl-C."""

from __future__ import annotations

import re
from typing import Any

import typer
import typer.core

from tangent_ops.cli.messages import begin, interrupted


class Commands(typer.core.TyperGroup):
    """Ends a command at Ctrl-C, with what is left."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        begin(found[1])
        return found

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            interrupted(error)
        except Exception as error:
            message = getattr(error, "message", None)
            if isinstance(message, str):  # of a wrong option, in the words of Typer's libraries
                error.message = _plain(message)  # pyright: ignore[reportAttributeAccessIssue]
            raise


def _plain(message: str) -> str:
    message = re.sub(r"\bValue error, ", "", message)
    return re.sub(
        r"Input should be a valid (integer|number)(, unable to parse string as an? \w+)?",
        lambda found: "expected an integer" if found[1] == "integer" else "expected a number",
        message,
    )
