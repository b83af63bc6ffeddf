"""The file of a shard's statistics: as `save_statistics` writes it, with the meta in the header."""

from __future__ import annotations

from pathlib import Path

from tangent_ops.composition.ledger import sealed
from tangent_ops.composition.ledger.kind import Label
from tangent_ops.composition.ledger.sealed import Seal
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.composition.statistics_file import file_content, parsed
from tangent_ops.errors import LedgerError, StatisticsFileError

_LABEL = "ledger"  # our key in the header


def save(path: Path, statistics: TangentStatistics, label: Label) -> Seal:
    """Write a new file; it is synced to disk when this returns."""
    tensors, metadata = file_content(statistics)
    sealed.write(path, tensors, metadata | {_LABEL: label.to_json()})
    return sealed.seal(path)


def read_label(folder: Path, seal: Seal, shard: str) -> Label:
    """The label, without reading the statistics.

    Raises:
        LedgerError: the file is missing, damaged, was edited or belongs to another shard.
    """
    return Label.from_json(sealed.header(folder, seal)[_LABEL], shard, folder / seal.name)


def load(folder: Path, seal: Seal, shard: str) -> tuple[TangentStatistics, Label]:
    """The statistics, with the list of samples, and the label.

    Raises:
        LedgerError: as `read_label`.
    """
    path = folder / seal.name
    tensors, metadata = sealed.read(folder, seal)
    label = Label.from_json(metadata[_LABEL], shard, path)
    try:
        return parsed(path, tensors, metadata), label
    except StatisticsFileError as error:
        raise LedgerError(str(error)) from error
