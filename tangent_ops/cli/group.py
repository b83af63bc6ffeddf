"""The group of all commands: it knows which one runs, and what to print after Ctrl-C."""

from __future__ import annotations

import re
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
