"""``tangent-ops inspect``."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tangent_ops.cli.messages import counted, errors, say

_SHOWN = 20  # shards, or items of a list


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A run's or ledger's folder, or the file of a delta, statistics, a core basis, an "
            "anchor or a program."
        ),
    ],
    shards: Annotated[
        bool,
        typer.Option(
            "--shards",
            help="List all shards of a run, not only the first 20; for --json, list them, too.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show what a folder or file is."""
    from tangent_ops.composition.ledger.base import DATABASE as LEDGER
    from tangent_ops.shards import ShardRecipe
    from tangent_ops.shards.run_folder import DATABASE as PLAN

    with errors():
        if (path / PLAN).exists():
            found = _run(path, shards or not as_json)
        elif (path / LEDGER).exists():
            found = _ledger(path)
        else:
            found = _file(path)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    listed = found.pop("list", None)
    if listed is None:
        _show(found)
        return
    recipe = ShardRecipe.from_dict(found["recipe"])
    _show(found | {"recipe": recipe.applied})
    _show_shards(listed, recipe.method, None if shards else _SHOWN)


def _show(found: dict[str, Any]) -> None:
    """One fact per row; those of a table within it are indented."""
    rows = list(_rows(found))
    width = max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        say(f"{name + ':':<{width}} {text}".rstrip())


def _rows(found: dict[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        name = indent + name.replace("_", " ")
        if isinstance(value, dict) and not indent:
            yield name, ""
            yield from _rows(value, "  ")
        else:
            yield name, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name.replace('_', ' ')} {_text(one)}" for name, one in value.items()]
    if isinstance(value, list):
        shown = ", ".join(map(_text, value[:_SHOWN])) or "none"
        return shown + (f" and {len(value) - _SHOWN} more" if len(value) > _SHOWN else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None or value == "" else str(value)


def _show_shards(listed: list[dict[str, Any]], method: str, most: int | None) -> None:
    from tangent_ops.shards.run_folder import DELTAS, STATISTICS

    folder = STATISTICS if method == "statistics" else DELTAS
    table = Table("shard", "images", "trained")
    table.columns[1].justify = "right"
    table.add_column("file", overflow="fold")
    for row in listed[:most]:
        done = "yes" if row["done"] else "no" if row["delta"] else "it is empty"
        file = f"{folder}/{row['delta']}" if row["done"] else ""
        table.add_row(escape(row["name"]), str(row["samples"]), done, file)
    Console().print(table)
    if most is not None and len(listed) > most:
        say(f"and {len(listed) - most} more shards, which --shards lists")


def _run(path: Path, shards: bool) -> dict[str, Any]:
    from tangent_ops.errors import LedgerError
    from tangent_ops.shards import Plan, settled_ledger

    plan = Plan.open(path)
    rows = plan.shards()
    try:
        composed = counted(len(settled_ledger(plan)), "shard")
    except LedgerError:
        composed = "no, or not up to date: tangent-ops compose"
    found: dict[str, Any] = {
        "what": "run",
        "shards": len(rows),
        "trained": sum(row.done for row in rows),
        "empty": sum(row.job is None for row in rows),
        "samples": sum(row.samples for row in rows),
        "overlap": plan.overlap,
        "composed": composed,
        "anchor": _anchor(plan.anchor_path),
        "recipe": plan.recipe.to_dict(),
        "data": {"root": plan.data.root, "name": plan.data.name, "split": plan.data.split},
    }
    if shards:
        found["list"] = [
            {
                "name": row.name,
                "samples": row.samples,
                "done": row.done,
                "delta": row.job and plan.result_path(row.job).name,
            }
            for row in rows
        ]
    return found


def _anchor(path: Path) -> dict[str, Any]:
    from tangent_ops.shards import read_anchor

    info = read_anchor(path)
    return {
        "model": info.name,
        "options": info.options,
        "classes": list(info.classes),
        "input": info.input,
        "fingerprint": info.fingerprint,
    }


def _ledger(path: Path) -> dict[str, Any]:
    from tangent_ops.composition.ledger import Ledger, open_ledger

    ledger = open_ledger(path)
    if isinstance(ledger, Ledger):
        entries = ledger.list()
        weight = sum(entry.weight for entry in entries)
        return {"what": "ledger", "shards": len(entries), "weight": weight}
    rows = ledger.list()
    samples = sum(row.samples for row in rows)
    return {"what": "ledger of statistics", "shards": len(rows), "samples": samples}


def _statistics(path: Path) -> dict[str, Any]:
    from tangent_ops.composition.statistics_file import load_statistics

    found = load_statistics(path)
    meta = found.meta
    return {
        "what": "statistics",
        "model": meta.delta.model,
        "anchor": meta.delta.anchor,
        "basis": meta.delta.basis,
        "loss": meta.delta.loss,
        "samples": len(found),
        "samples by class": found.counts.tolist(),
        "core columns": meta.core_columns,
        "head": f"{meta.head_entries} x {meta.outputs}",
        "megabytes": round(found.nbytes / 1e6, 1),
    }


def _basis(path: Path) -> dict[str, Any]:
    from tangent_ops.shards.basis_file import load_basis

    found = load_basis(path)
    sizes = {name: [left.shape[1], len(right)] for name, (left, right) in found.items()}
    return {
        "what": "core basis",
        "fingerprint": found.fingerprint,
        "cores": sizes,
        "directions": found.directions,
        "in full": list(found.whole),
        "images that it remembers": len(found.remembers),
    }


def _program(path: Path) -> dict[str, Any]:
    """Describe an exported program. Nothing in it is loaded."""
    from tangent_ops.errors import ArgumentError

    try:
        with zipfile.ZipFile(path) as file:
            forms = [name for name in file.namelist() if name.endswith("/archive_format")]
            if (
                len(forms) != 1
                or file.getinfo(forms[0]).file_size != 3
                or file.read(forms[0]) != b"pt2"
            ):
                raise ArgumentError(f"{path} is an archive, but no exported program (.pt2)")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ArgumentError(f"{path} is a damaged archive: {error}") from error
    return {
        "what": "program",
        "megabytes": round(path.stat().st_size / 1e6, 1),
        "to run": f'torch.export.load("{path}").module()(images)',
    }


def _file(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    from tangent_ops import delta
    from tangent_ops.composition import statistics_file
    from tangent_ops.errors import ArgumentError, in_words
    from tangent_ops.files import opened
    from tangent_ops.shards import anchor, basis_file

    if path.is_dir():
        raise ArgumentError(f"{path} is neither a run's folder nor a ledger's")
    with opened(path) as name, open(name, "rb") as file:  # a pipe would block
        start = file.read(4)
    if start == b"PK\x03\x04":
        return _program(path)
    try:
        with safe_open(path, framework="pt") as file:
            form = (file.metadata() or {}).get("format")
    except SafetensorError as error:
        raise ArgumentError(f"{path} is not a file of tangent-ops: {in_words(error)}") from error
    if form == anchor.FORMAT:
        return {"what": "anchor", **_anchor(path)}
    if form == statistics_file.FORMAT:
        return _statistics(path)
    if form == basis_file.FORMAT:
        return _basis(path)
    if form != delta.FORMAT:
        raise ArgumentError(f"{path} is a safetensors file, but none that tangent-ops writes")
    found = delta.load_delta(path)
    meta = found.meta
    assert meta is not None
    return {
        "what": "delta",
        "shard": meta.shard,
        "model": meta.model,
        "anchor": meta.anchor,
        "trainable": meta.trainable,
        "loss": meta.loss,
        "rank": meta.rank,
        "parameters": sum(value.numel() for value in found.values()),
        "norm": sum(float(value.double().square().sum()) for value in found.values()) ** 0.5,
        "extra": {key: value[:80] for key, value in meta.extra.items()},
    }
