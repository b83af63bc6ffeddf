"""A shard's file: its delta as `save_delta` writes it, with weight and meta in the header.

They stand here and not in the database, since SQLite's secure_delete can leave copies of deleted
rows behind (where it rebuilds a page). A file can be overwritten and removed as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from tangent_ops._files import to_json
from tangent_ops.delta import Delta, DeltaMeta, load_delta, save_delta
from tangent_ops.errors import DeltaError, LedgerError
from tangent_ops.ledger import sealed
from tangent_ops.ledger.sealed import Seal

Value = str | int | float | bool | None  # of the meta that is given to `Ledger.add`

_EXTRA = "ledger"  # our key in DeltaMeta.extra
_UNKNOWN = DeltaMeta("unknown", "unknown", "unknown")  # stands for a meta that is None


@dataclass(frozen=True)
class Label:
    """What a shard's file says besides its delta."""

    shard: str
    weight: float
    meta: dict[str, Value]


def save(path: Path, delta: Mapping[str, Tensor], meta: DeltaMeta | None, label: Label) -> Seal:
    """Write the file, to disk before this returns."""
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
    save_delta(delta, path, meta=replace(own, extra=own.extra | {_EXTRA: line}))
    return sealed.seal(path)


def read_label(folder: Path, seal: Seal, shard: str) -> Label:
    """Weight and meta, without reading the delta.

    Raises:
        LedgerError: the file is missing, damaged, was edited or is another shard's.
    """
    record = json.loads(sealed.header(folder, seal)[f"extra.{_EXTRA}"])
    if record["shard"] != shard:
        raise LedgerError(f"{folder / seal.name} is of shard {record['shard']!r}, not {shard!r}")
    return Label(shard, record["weight"], record["meta"])


def load(folder: Path, seal: Seal, shard: str) -> tuple[Delta, Label]:
    """The delta, with the meta it was added with, and the label.

    Raises:
        LedgerError: as `read_label`.
    """
    label = read_label(folder, seal, shard)
    try:
        delta = load_delta(folder / seal.name)
    except (DeltaError, OSError) as error:
        raise LedgerError(str(error)) from error
    assert delta.meta is not None  # load_delta's promise
    known = json.loads(delta.meta.extra[_EXTRA])["known"]
    extra = {key: value for key, value in delta.meta.extra.items() if key != _EXTRA}
    delta.meta = replace(delta.meta, extra=extra) if known else None
    return delta, label
