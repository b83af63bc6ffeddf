"""Tells which command comes next, in full."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from tangent_ops.cli.messages import say

if TYPE_CHECKING:
    from tangent_ops.shards import Plan


def say_next(command: str, run: Path, plan: Plan, *words: str) -> None:
    """Print ``next:`` and a command on the run.

    Args:
        command: its name.
        run: as the user gave it.
        plan: of the run.
        words: further ones of the command.
    """
    told = ["tangent-ops", command, str(run), *words]
    rest = ""
    if command == "evaluate" and plan.validation is None:
        rest = " IMAGES, a folder of labelled images"
    say(f"next: {shlex.join(told)}{rest}")
