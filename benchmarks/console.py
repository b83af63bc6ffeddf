"""Where tables are printed."""

from __future__ import annotations

import sys

from rich.console import Console

_PIPED = 140  # characters: a log is no terminal of 80


def wide_console() -> Console:
    """The terminal as wide as it is; a pipe or file wide enough for one line per row."""
    return Console(width=None if sys.stdout.isatty() else _PIPED)
