"""Prints the errors and messages of commands."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape


@contextmanager
def errors(code: int = 2) -> Iterator[None]:
    """Print an error of the library, and exit."""
    from tangent_ops.errors import TangentOpsError

    try:
        yield
    except (TangentOpsError, OSError) as error:
        fail(str(error), code, error)


def fail(message: str, code: int, cause: Exception | None = None) -> NoReturn:
    """Print an error, and exit."""
    Console(stderr=True).print(
        f"[bold red]error:[/bold red] {escape(message)}", highlight=False, soft_wrap=True
    )
    raise typer.Exit(code) from cause


def say(text: str) -> None:
    """Print text as it is."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def tell(text: str) -> None:
    """Print text that is not a result to stderr, as it is."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def hidden(as_json: bool) -> bool:
    """Whether to hide progress bars: the output is JSON, or stderr is not a terminal."""
    return as_json or not sys.stderr.isatty()


def need_privacy() -> None:
    """Exit with an install command if packages of the extra ``privacy`` are missing."""
    needed = ("dp_accounting", "opacus", "scipy")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        fail(f'this needs {", ".join(missing)}: pip install "tangent-ops[privacy]"', code=2)
