"""The shell commands on Markdown pages: that their programs, targets and options exist."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.pages.blocks import ROOT, Block, blocks

ASSIGNMENT = re.compile(r"^[A-Z_]+=")
# Programs of others: what follows them is not checked.
OTHERS = {".venv/bin/pre-commit", "chromium", "export", "git", "npm", "source", "torchrun"}
OURS = {".ci/run", "make", "pip", "pytest", "python", "python3", "tangent-ops"}
SHELLS = {"bash", "console", "sh", "shell"}


class CommandError(Exception):
    """What of a command does not exist."""


def commands(page: Path) -> list[tuple[str, str]]:
    """The shell commands in the page's blocks and in spans of `tangent-ops`: (place, command)."""
    found = []
    for block in blocks(page):
        if block.language in SHELLS or (block.language in (None, "") and _is_shell(block)):
            text = block.code.replace("\\\n", " ")
            found += [(str(block), line.strip()) for line in text.splitlines() if line.strip()]
    text = page.read_text(encoding="utf-8")
    for span in re.findall(r"(?<!`)`(tangent-ops [^`\n]+|make [a-z-]+)`(?!`)", text):
        found.append((str(page), span.replace("...", "")))
    return found


def _is_shell(block: Block) -> bool:
    words = [word for word in block.code.split() if not ASSIGNMENT.match(word)]
    return bool(words) and words[0] in OURS | OTHERS


def check(command: str) -> None:
    """Check one line: each of its programs, and the options and targets that it names.

    Raises:
        CommandError: A program, command, option, target, module, file or extra does not exist.
    """
    for part in _parts(command):
        while part and ASSIGNMENT.match(part[0]):
            part = part[1:]
        if not part or part[0] in OTHERS:
            continue
        name, *rest = part
        if name == "tangent-ops":
            _check_app(rest)
        elif name == "make":
            _check_make(rest)
        elif name in ("python", "python3", "pytest"):
            _check_python(["-m", "pytest", *rest] if name == "pytest" else rest)
        elif name == "pip":
            _check_pip(rest)
        elif not (ROOT / name).is_file():
            raise CommandError(
                f"{name}: unknown; if it is another's, add it to OTHERS in {__file__}"
            )


def _parts(command: str) -> list[list[str]]:
    words = shlex.shlex(command, posix=True, punctuation_chars=";&|")
    words.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set(";&|"):
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


@functools.cache
def _app() -> Any:
    import typer

    from tangent_ops.cli.app import app

    return typer.main.get_command(app)


def _check_app(words: list[str]) -> None:
    command, path = _app(), "tangent-ops"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if words[0] in ("COMMAND", "NAME"):
            return
        if words[0] not in command.commands:
            raise CommandError(f"{path} has no command {words[0]!r}")
        command, path = command.commands[words[0]], f"{path} {words[0]}"
        words = words[1:]
    known = {name: option for option in command.params for name in option.opts}
    known |= {name: option for option in command.params for name in option.secondary_opts}
    known["--help"] = None
    at, given = 0, 0
    while at < len(words):
        name, has_value, value = words[at].partition("=")
        at += 1
        if not name.startswith("-"):
            given += 1
            continue
        if name not in known:
            raise CommandError(f"{path} has no option {name}")
        option = known[name]
        if option is None or getattr(option, "is_flag", False):
            continue
        if not has_value:
            if at == len(words):
                continue  # the text speaks of the option
            value, at = words[at], at + 1
        choices = [text for text in _choices(option) if isinstance(text, str)]
        if choices and not set(value.split("|")) <= set(choices):
            raise CommandError(f"{path} {name} takes {', '.join(choices)}, not {value!r}")
    arguments = [option for option in command.params if option.param_type_name == "argument"]
    if given > len(arguments) and all(option.nargs == 1 for option in arguments):
        raise CommandError(f"{path} takes {len(arguments)} arguments, not {given}")


def _choices(option: Any) -> Sequence[Any]:
    """What Typer lets the option be: of its annotation, or, before Typer 0.29, of its type."""
    if (described := getattr(option, "type_descriptor", None)) is not None:
        return typing.get_args(described.annotation)
    return getattr(option.type, "choices", ())


def _check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", text, flags=re.MULTILINE))
    for word in words:
        variable = re.match(r"^([A-Z]+)=", word)
        if variable and f"$({variable[1]})" not in text and f"{variable[1]} ?=" not in text:
            raise CommandError(f"the Makefile has no variable {variable[1]}")
        if not variable and word not in targets:
            raise CommandError(f"the Makefile has no target {word!r}")


def _check_python(words: list[str]) -> None:
    """A script or module exists; of the checkout's own, the options stand in its folder's code."""
    if not words or words[0] in ("-c", "..."):
        return
    if words[0] == "-m":
        name, *rest = words[1:]
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise CommandError(f"python -m {name}: no such module")
        file = Path(spec.origin)
    else:
        name, *rest = words
        file = ROOT / name
        if not file.is_file():
            raise CommandError(f"python {name}: no such file")
    if name == "pytest":
        for path in (word.partition("::")[0] for word in rest if not word.startswith("-")):
            if (path.endswith(".py") or "/" in path) and not (ROOT / path).exists():
                raise CommandError(f"pytest {path}: no such file or folder")
    elif file.is_relative_to(ROOT):
        code = "".join(path.read_text(encoding="utf-8") for path in file.parent.glob("*.py"))
        options = [word.partition("=")[0] for word in rest if word.startswith("--")]
        for option in options:
            if option != "--" and f'"{option}"' not in code:
                raise CommandError(f"{name} has no option {option}")


def _check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words:
        if extras := re.match(r"^(?:\.|tangent-ops)\[(.+)\]$", word):
            for extra in extras[1].split(","):
                if extra not in project["optional-dependencies"]:
                    raise CommandError(f"pip: tangent-ops has no extra {extra!r}")
