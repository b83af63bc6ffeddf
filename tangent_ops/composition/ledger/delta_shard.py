"""The file of a shard's delta: as `save_delta` writes it, with weight and meta in the header.

Weight and meta are not in the database, because SQLite's secure_delete can leave copies of deleted
rows behind (where it rebuilds a page). A file can be overwritten and removed as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tangent_ops.composition.ledger import sealed
from tangent_ops.composition.ledger.kind import Label
from tangent_ops.composition.ledger.sealed import Seal
from tangent_ops.delta import Delta, DeltaMeta, file_content, parse_meta
from tangent_ops.files import write_new, write_safetensors

_EXTRA = "ledger"  # our key in DeltaMeta.extra
_UNKNOWN = DeltaMeta("unknown", "unknown", "unknown")  # stands for a meta that is None


def save(path: Path, delta: Delta, label: Label) -> Seal:
    """Write a new file; it is synced to disk when this returns."""
    line = label.to_json(known=delta.meta is not None)
    own = delta.meta or _UNKNOWN
    tensors, metadata = file_content(delta, replace(own, extra=own.extra | {_EXTRA: line}))
    write_new(path, lambda file: write_safetensors(file, tensors, metadata))
    return sealed.seal(path)


def read_label(folder: Path, seal: Seal, shard: str) -> Label:
    """The label, without reading the delta.

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
    line = meta.extra[_EXTRA]
    label = Label.from_json(line, shard, path)
    extra = {key: value for key, value in meta.extra.items() if key != _EXTRA}
    return label, replace(meta, extra=extra) if json.loads(line)["known"] else None
