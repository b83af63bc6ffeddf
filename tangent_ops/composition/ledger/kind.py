"""What a ledger's shards and its running sum hold: the part in which kinds of ledgers differ."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from tangent_ops.composition.ledger import sealed
from tangent_ops.composition.ledger.sealed import Seal
from tangent_ops.errors import LedgerError
from tangent_ops.files import to_json

Value = str | int | float | bool | None  # of the meta given with a shard


class Rules(Protocol):
    """What the shards of a ledger have in common."""

    def joined(self, other: Self, what: str) -> Self:
        """These rules, and those of `other` where these are open; raises if they differ."""
        ...


C = TypeVar("C")  # what is added up
R = TypeVar("R", bound=Rules)


@dataclass(frozen=True)
class Label:
    """What a shard's file holds besides its content.

    Attributes:
        shard: its id.
        weight: of a delta in the mean; of statistics, the number of their samples.
        meta: as given with it.
    """

    shard: str
    weight: float
    meta: dict[str, Value]

    def to_json(self, **more: object) -> str:
        """A salted line for the file's header."""
        own = {"meta": self.meta, "salt": sealed.salt(), "shard": self.shard, "weight": self.weight}
        return to_json(own | more)

    @classmethod
    def from_json(cls, line: str, shard: str, path: Path) -> Label:
        """What `to_json` wrote; raises LedgerError, naming the path, if it is of another shard."""
        record = json.loads(line)
        if record["shard"] != shard:
            raise LedgerError(f"{path} is of shard {record['shard']!r}, not {shard!r}")
        return cls(shard, record["weight"], record["meta"])


class RunningSum(ABC, Generic[C, R]):
    """The exact sum of the present shards.

    `subtract` is the exact inverse of `add`. So all of it but `rules` depends on the present shards
    only, not on what was added and forgotten before, or in which order.

    Attributes:
        rules: what may be added.
    """

    rules: R

    @classmethod
    @abstractmethod
    def empty(cls, rules: R | None = None) -> Self:
        """The sum of no shards."""

    @property
    @abstractmethod
    def shards(self) -> int:
        """How many shards are in the sum."""

    @property
    @abstractmethod
    def total_weight(self) -> float:
        """The sum of the shards' weights."""

    @abstractmethod
    def add(self, content: C, label: Label) -> None:
        """Add a shard.

        Raises:
            DeltaError, StatisticsError: the content breaks the rules.
            LedgerError, StatisticsError: a sum would be out of range. Nothing was added.
        """

    @abstractmethod
    def subtract(self, content: C, label: Label) -> None:
        """Undo `add` with the same arguments."""

    @abstractmethod
    def differences(self, other: Self) -> list[str]:
        """The names, for a message, of what differs in `other`; the rules are not compared."""

    @abstractmethod
    def save(self, path: Path) -> Seal:
        """Write the file; it is synced to disk when this returns."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, seal: Seal) -> Self:
        """Read what `save` wrote.

        Raises:
            LedgerError: the file is missing, damaged, was edited, or is of a later format.
        """

    @staticmethod
    @abstractmethod
    def load_rules(folder: Path, seal: Seal) -> R:
        """The rules in a file that `save` wrote, without reading the sums; raises as `load`."""

    @staticmethod
    @abstractmethod
    def load_count(folder: Path, seal: Seal) -> int:
        """How many shards are in the sum, without reading it; raises as `load`."""


@dataclass(frozen=True)
class Kind(Generic[C, R]):
    """One kind of ledger.

    Attributes:
        ledger: the name of its class.
        folder: the name of the folder of its shards' files.
        sum: the class of its running sum.
        save: writes a new shard's file; it is synced to disk when this returns.
        load: content and label of a shard's file, given the folder, the seal and the shard's id;
            raises LedgerError if the file is missing, damaged, was edited or is another shard's.
        read_label: the label, without reading the content; raises as `load`.
    """

    ledger: str
    folder: str
    sum: type[RunningSum[C, R]]
    save: Callable[[Path, C, Label], Seal]
    load: Callable[[Path, Seal, str], tuple[C, Label]]
    read_label: Callable[[Path, Seal, str], Label]
