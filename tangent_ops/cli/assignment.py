"""Assigns images to shards for ``tangent-ops finetune``, and labels for ``forget``."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from tangent_ops.errors import ArgumentError, in_words
from tangent_ops.shards import Samples, by_class, by_column, by_hash

_SHOWN = 50  # classes


@dataclass(frozen=True)
class Assignment:
    """How samples are assigned to shards: the options in the panel Shards."""

    shards: int = 1
    proportions: str | None = None
    by: str = "hash"
    table: Path | None = None
    label: str | None = None
    allow_overlap: bool = False

    def deal(self, samples: Samples) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Shard -> ids, and id -> label.

        Raises:
            ArgumentError: options that do not fit together, or a table that lacks an image.
        """
        column = self.by if self.by not in ("hash", "class") else None
        label = self.label or column
        if (self.table is None) != (label is None):
            missing = "--table" if self.table is None else "--by or --label, a column of it"
            raise ArgumentError(f"a table and a column go together: give {missing}, too")
        if self.by != "hash" and (self.shards != 1 or self.proportions is not None):
            raise ArgumentError(
                f"--shards and --proportions are for --by hash, not for --by {self.by}"
            )
        labels: dict[str, str] = {}
        if self.table is not None and label is not None:
            labels = _column(self.table, label)
            by_column(samples.ids, labels)  # raises for an image without a label
        if column is not None and self.table is not None:
            owners = labels if column == label else _column(self.table, column)
            return by_column(samples.ids, owners), labels
        if self.by == "class":
            return by_class(samples.ids, samples.targets, classes_of(samples)), labels
        parts = self._parts()
        count = len(parts) if parts is not None and self.shards == 1 else self.shards
        return by_hash(samples.ids, count, proportions=parts), labels

    def _parts(self) -> list[float] | None:
        if self.proportions is None:
            return None
        try:
            return [float(part) for part in self.proportions.split(",")]
        except ValueError as error:
            raise ArgumentError(
                f"--proportions {self.proportions}: expected numbers, such as 5,1,1"
            ) from error


def classes_of(samples: Samples) -> list[str]:
    """The names of the classes, or their numbers if they have no names."""
    return list(samples.classes) or [str(k) for k in range(max(samples.targets) + 1)]


def described(samples: Samples) -> str:
    """Text that lists the classes with their numbers of images, and the files passed over."""
    counts = samples.counts()
    listed = [f"{_printable(name)} {count}" for name, count in list(counts.items())[:_SHOWN]]
    if len(counts) > _SHOWN:
        listed.append(f"and {len(counts) - _SHOWN} more classes, which --json lists")
    words = f"{len(samples)} images of {len(counts)} classes: {', '.join(listed)}"
    return f"{words}\n{passed_over(samples)}" if samples.passed_over else words


def passed_over(samples: Samples) -> str:
    """Text that tells of the files that are no images."""
    others = [_printable(name) for name in samples.passed_over[:3]]
    return (
        f"files without an image's name, passed over: {len(samples.passed_over)} files "
        f"({', '.join(others)}{', ...' if len(samples.passed_over) > 3 else ''})"
    )


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _column(table: Path, column: str) -> dict[str, str]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a BOM
            rows = csv.DictReader(file)
            for needed in ("sample", column):
                if needed not in (rows.fieldnames or ()):
                    raise ArgumentError(
                        f"--table {table} has no column {needed!r}; it has "
                        f"{', '.join(rows.fieldnames or ())}"
                    )
            found: dict[str, str] = {}
            for row in rows:
                if found.setdefault(row["sample"], row[column]) != row[column]:
                    raise ArgumentError(f"--table {table} has {row['sample']!r} twice")
    except UnicodeError as error:
        raise ArgumentError(f"--table {table} is no text in UTF-8: save it as CSV UTF-8") from error
    except (OSError, csv.Error) as error:
        raise ArgumentError(f"--table {table} cannot be read: {in_words(error)}") from error
    return found
