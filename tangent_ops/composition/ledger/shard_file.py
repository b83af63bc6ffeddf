"""A shard's file: its delta as `save_delta` writes it, with weight and meta in the header.

Weight and meta are not in the database, because SQLite's secure_delete can leave copies of deleted
rows behind (where it rebuilds a page). A file can be overwritten and removed as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from tangent_ops.composition.ledger import sealed
from tangent_ops.composition.ledger.sealed import Seal
from tangent_ops.delta import Delta, DeltaMeta, file_content, parse_meta
from tangent_ops.errors import LedgerError
from tangent_ops.files import to_json, write_new, write_safetensors

Value = str | int | float | bool | None  # of `Ledger.add`'s meta

_EXTRA = "ledger"  # our key in DeltaMeta.extra
_UNKNOWN = DeltaMeta("unknown", "unknown", "unknown")  # stands for a meta that is None


@dataclass(frozen=True)
class Label:
    """What a shard's file holds besides its delta: the shard's id, weight and meta."""

    shard: str
    weight: float
    meta: dict[str, Value]


def save(path: Path, delta: Mapping[str, Tensor], meta: DeltaMeta | None, label: Label) -> Seal:
    """Write a new file; it is synced to disk when this returns."""
    line = to_json(
        {
            "known": meta is not None,
            "meta": label.meta,
            "salt": sealed.salt(),
            "shard": label.shard,
            "weight": label.weight,
        }
    )
    own = meta or _UNKNOWN
    meta = replace(own, extra=own.extra | {_EXTRA: line})
    tensors, metadata = file_content(delta, meta)
    write_new(path, lambda file: write_safetensors(file, tensors, metadata))
    return sealed.seal(path)


def read_label(folder: Path, seal: Seal, shard: str) -> Label:
    """Weight and meta, without reading the delta.

    Raises:
        LedgerError: the file is missing, damaged, was edited or belongs to another shard.
    """
    return _parsed(sealed.header(folder, seal), folder / seal.name, shard)[0]


def read_origin(folder: Path, seal: Seal, shard: str) -> DeltaMeta | None:
    """The meta that the delta was added with, without reading the delta.

    Raises:
        LedgerError: as `read_label`.
    """
    return _parsed(sealed.header(folder, seal), folder / seal.name, shard)[1]


def load(folder: Path, seal: Seal, shard: str) -> tuple[Delta, Label]:
    """The delta, with the meta it was added with, and the label.

    Raises:
        LedgerError: as `read_label`.
    """
    tensors, metadata = sealed.read(folder, seal)
    label, origin = _parsed(metadata, folder / seal.name, shard)
    return Delta(tensors, origin), label


def _parsed(metadata: Mapping[str, str], path: Path, shard: str) -> tuple[Label, DeltaMeta | None]:
    meta = parse_meta(metadata)
    record = json.loads(meta.extra[_EXTRA])
    if record["shard"] != shard:
        raise LedgerError(f"{path} is of shard {record['shard']!r}, not {shard!r}")
    extra = {key: value for key, value in meta.extra.items() if key != _EXTRA}
    origin = replace(meta, extra=extra) if record["known"] else None
    return Label(shard, record["weight"], record["meta"]), origin
