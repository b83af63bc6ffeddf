"""Prints the errors and messages of commands."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

INTERRUPTED = 130  # exit code, by convention 128 + SIGINT

_OTHER_NAMES: dict[Any, str] = {"data_name": "name"}  # of an option -> of the argument

running: ContextVar[Any] = ContextVar("running", default=None)  # the command

_NOTHING = "nothing was written"
_left: ContextVar[str | Callable[[], str]] = ContextVar("left", default=_NOTHING)


@contextmanager
def errors(code: int = 2) -> Iterator[None]:
    """Print an error of the library, and exit with the code."""
    from tangent_ops.errors import TangentOpsError, in_words

    try:
        yield
    except (TangentOpsError, OSError) as error:
        fail(_with_options(in_words(error)), code, error)


def begin(command: Any) -> None:
    """A command runs from here on, and has written nothing."""
    running.set(command)
    leaves(_NOTHING)


def leaves(what: str | Callable[[], str]) -> None:
    """Say what is left if Ctrl-C ends the command from here on, or give a function that says it."""
    _left.set(what)


def interrupted(error: KeyboardInterrupt) -> NoReturn:
    """Print what Ctrl-C left, and exit."""
    left = _left.get()
    fail(f"interrupted: {left if isinstance(left, str) else left()}", INTERRUPTED, error)


def fail(message: str, code: int, cause: BaseException | None = None) -> NoReturn:
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


def counted(number: int, what: str) -> str:
    """The number of some things, in words: 1 image, 2 images."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def listed(main: str, rest: dict[str, int]) -> str:
    """The main words, and each of the rest that is not 0: 3 shards trained, 1 failed."""
    return ", ".join([main, *(f"{number} {what}" for what, number in rest.items() if number)])


def hidden(as_json: bool) -> bool:
    """Whether to hide progress bars: the output is JSON, or stderr is not a terminal."""
    return as_json or not sys.stderr.isatty()


def need(extra: str, *packages: str) -> None:
    """Exit with an install command if packages of an extra are missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        fail(f'this needs {", ".join(missing)}: pip install "tangent-ops[{extra}]"', code=2)


def need_privacy() -> None:
    """Exit with an install command if packages of the extra ``privacy`` are missing."""
    need("privacy", "dp_accounting", "opacus", "scipy")


def _with_options(message: str) -> str:
    """The message with Python's names of arguments as the present command's options."""
    for parameter in getattr(running.get(), "params", ()):
        option = next((text for text in parameter.opts if text.startswith("--")), None)
        if option is None or not parameter.name:
            continue
        name = str(_OTHER_NAMES.get(parameter.name, parameter.name))
        # NAME=VALUE, then a name that is no English word, then a name that begins the message.
        message = re.sub(rf"(?<![\w/.\-]){name}=(['\"]?)([^'\"\s:,;]+)\1", rf"{option} \2", message)
        if "_" in name:
            message = re.sub(rf"(?<![\w/.\-'\"]){name}(?![\w/.'\"=])", option, message)
        message = re.sub(rf"^{name}(?= (must|is|needs|are) )", option, message)
    return message
