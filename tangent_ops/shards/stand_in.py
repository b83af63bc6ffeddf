"""Stands in for the ledger and the files of statistics until they are merged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.errors import LedgerError, StatisticsError
from tangent_ops.files import content_sha256, erase, opened, write_atomically, write_safetensors


def save_statistics(statistics, path, *, extra: Mapping[str, str] | None = None) -> None:
    tensors, metadata = statistics.to_tensors()
    metadata = {**metadata, **{f"extra.{k}": v for k, v in (extra or {}).items()}}
    metadata["format"] = "tangent-ops statistics"
    metadata["content_sha256"] = content_sha256(tensors, metadata)
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    write_atomically(Path(path), lambda file: write_safetensors(file, tensors, metadata))


def load_statistics(path) -> TangentStatistics:
    return _load(path)[0]


def read_extra(path) -> dict[str, str]:
    metadata = _load(path)[1]
    return {k[6:]: v for k, v in metadata.items() if k.startswith("extra.")}


def _load(path):
    try:
        with opened(path) as name, safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StatisticsError(f"{path} is truncated: {error}") from error
    if metadata.get("format") != "tangent-ops statistics":
        raise StatisticsError(f"{path} holds no statistics")
    written = metadata.pop("content_sha256")
    if content_sha256(tensors, metadata) != written:
        raise StatisticsError(f"{path} was changed after it was written")
    return TangentStatistics.from_tensors(tensors, metadata), metadata


@dataclass(frozen=True)
class Entry:
    shard: str
    meta: dict[str, Any]
    weight: float


class StatisticsLedger:
    def __init__(self, path, *, anchor=None, create=True) -> None:
        self.path = Path(path)
        if not create and not (self.path / "index.json").exists():
            raise LedgerError("no ledger")
        self.path.mkdir(exist_ok=True)

    def _index(self) -> dict[str, Any]:
        file = self.path / "index.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def _write(self, index) -> None:
        (self.path / "index.json").write_text(json.dumps(index))

    def list(self):
        return [Entry(s, m["meta"], m["samples"]) for s, m in self._index().items()]

    def add(self, shard_id, statistics, meta=None) -> None:
        if isinstance(statistics, (str, os.PathLike)):
            statistics = load_statistics(statistics)
        index = self._index()
        save_statistics(statistics, self.path / f"{len(index)}-{os.urandom(4).hex()}.st")
        newest = max(self.path.glob("*.st"), key=lambda p: p.stat().st_mtime_ns)
        index[shard_id] = {
            "file": newest.name,
            "meta": dict(meta or {}),
            "samples": len(statistics),
        }
        self._write(index)

    def forget(self, shard_id, rebuild=False, progress=True) -> None:
        index = self._index()
        erase(self.path / index.pop(shard_id)["file"])
        self._write(index)

    def statistics(self) -> TangentStatistics:
        found = [load_statistics(self.path / m["file"]) for m in self._index().values()]
        if not found:
            raise LedgerError("the ledger is empty")
        total = found[0]
        for one in found[1:]:
            total = total + one
        return total.without_list()

    def __len__(self) -> int:
        return len(self._index())
