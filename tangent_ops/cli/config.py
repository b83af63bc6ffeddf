"""``--config FILE``: options from a TOML or YAML file; the command line overrides them."""

from __future__ import annotations

import difflib
import tomllib
from inspect import unwrap
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from tangent_ops.cli.messages import fail
from tangent_ops.errors import in_words

_LARGEST = 1 << 20  # bytes; nobody writes so many options


def _read(context: typer.Context, path: Path | None) -> Path | None:
    if path is None or context.resilient_parsing:  # shell completion
        return path
    values = _parsed(path)
    known = {parameter.name for parameter in context.command.params} - {"config"}
    repeated = {p.name for p in context.command.params if getattr(p, "multiple", False)}
    hints = get_type_hints(unwrap(context.command.callback))  # pyright: ignore[reportArgumentType]
    found = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = {"json": "as_json"}.get(name, name)
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known - {None}), n=1)  # pyright: ignore
            hint = f": did you mean {close[0]}?" if close else "; --help lists the options"
            fail(f"{path} has an option {key!r}, which {context.info_name} does not have{hint}", 2)
        if isinstance(value, (dict, list)):
            fail(f"{path}: {key} must be one value, got {value!r}", 2)
        kinds = {hints.get(name), *get_args(hints.get(name))}
        if value is not None and isinstance(value, bool) != (bool in kinds):
            what = "must be true or false" if bool in kinds else "is not a switch"
            fail(f"{path}: {key} {what}, got {value!r}", 2)
        if isinstance(value, float) and int in kinds:  # some releases of Typer truncate it
            fail(f"{path}: {key} must be an integer, got {value!r}", 2)
        found[name] = [value] if name in repeated else value
    context.default_map = {**(context.default_map or {}), **found}
    return path


def _parsed(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            fail(f"{path} is too large for a file of options", 2)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            found = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            found = _yaml(yaml, text)
        else:
            fail(f"{path}: expected a .toml, .yaml or .yml file", 2)
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path} cannot be read: {in_words(error)}", 2, error)
    if not isinstance(found, dict):
        fail(f"{path} holds no options: write one `name: value` per line", 2)
    return found


def _yaml(yaml: Any, text: str) -> Any:
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_read,
        is_eager=True,
        exists=True,
        dir_okay=False,
        help="Options from a .toml or .yaml file, one `name = value` (or `name: value`) per line. "
        "The command line overrides them.",
    ),
]
