"""The plan's database: shards and their samples. Values read from it are checked."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tangent_ops.checks import suggestion
from tangent_ops.errors import PlanError
from tangent_ops.files import sweep, temporary_file
from tangent_ops.shards.data import safe

LONGEST_NAME = 200

_APPLICATION_ID = 0x74616E70  # "tanp" in the database's header
_VERSION = 1
_TABLES = (
    "CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE shard (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    "CREATE TABLE sample (shard INTEGER NOT NULL, id TEXT NOT NULL, target INTEGER NOT NULL,"
    " content TEXT NOT NULL, label TEXT, PRIMARY KEY (shard, id)) WITHOUT ROWID",
    "CREATE INDEX sample_id ON sample (id)",
    "CREATE INDEX sample_content ON sample (content)",
    "CREATE INDEX sample_label ON sample (label)",
    'CREATE TABLE removed ("when" TEXT NOT NULL, shard TEXT NOT NULL, samples INTEGER NOT NULL)',
)
_CHUNK = 500  # of values in one statement


@dataclass(frozen=True)
class Sample:
    """One row: the id, the class index, the content's SHA-256 and the label, if there is one."""

    id: str
    target: int
    content: str
    label: str | None = None


@dataclass(frozen=True)
class Removed:
    """How many samples were removed from a shard, and when, in UTC, in ISO format."""

    when: str
    shard: str
    samples: int


class Manifest:
    """The database file. Each operation opens it anew."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, about: Mapping[str, str], shards: Mapping[str, Iterable[Sample]]) -> None:
        """Write a new file, completely or not at all."""
        sweep(self.path.parent)
        with temporary_file(self.path.parent) as file:
            temporary = Path(file.name)
            with self._connected("rwc", temporary) as connection:
                connection.execute("BEGIN")
                for statement in _TABLES:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
                connection.executemany("INSERT INTO about VALUES (?, ?)", about.items())
                for number, (name, samples) in enumerate(shards.items()):
                    connection.execute("INSERT INTO shard VALUES (?, ?)", (number, name))
                    connection.executemany(
                        "INSERT INTO sample VALUES (?, ?, ?, ?, ?)",
                        ((number, s.id, s.target, s.content, s.label) for s in samples),
                    )
                connection.execute("COMMIT")
            os.fsync(file.fileno())
            os.replace(temporary, self.path)

    def check(self) -> None:
        """Raise PlanError unless the file is a plan's database that this release reads."""
        with self._connected("ro") as connection:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if application != _APPLICATION_ID:
                raise PlanError(f"{self.path} is not a plan of shards: give another folder")
            if version != _VERSION:
                raise PlanError(
                    f"{self.path} has format version {version}, this release reads {_VERSION}: "
                    "update tangent-ops"
                )
            # No views and no triggers, which could make a query do other things.
            found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")
            if sorted(row[0] for row in found) != sorted(_TABLES):
                raise PlanError(f"{self.path} has other tables than a plan: it was edited")

    def about(self) -> dict[str, str]:
        """What the plan records besides shards and samples: key -> value."""
        with self._connected("ro") as connection:
            return {
                _text(key): _text(value)
                for key, value in connection.execute("SELECT key, value FROM about")
            }

    def set_weights(self, weights: str) -> None:
        """Change the weights in `about`."""
        self._set("weights", weights)

    def set_l2(self, l2: str) -> None:
        """Change l2 in `about`."""
        self._set("l2", l2)

    def set_data(self, data: str) -> None:
        """Change the place of the images in `about`."""
        self._set("data", data)

    def set_validation(self, validation: str) -> None:
        """Set, or change, the place of the validation images in `about`."""
        self._set("validation", validation)

    def names(self) -> list[str]:
        """The shards' names, in their order."""
        with self._connected("ro") as connection:
            rows = connection.execute("SELECT name FROM shard ORDER BY number")
            return [_name(row[0]) for row in rows]

    def suggestion(self, sample: str | None = None, label: str | None = None) -> str:
        """What there is instead of an unknown sample or label: the end of a message."""
        column = "id" if label is None else "label"
        query = f"SELECT DISTINCT {column} FROM sample WHERE {column} IS NOT NULL ORDER BY {column}"
        with self._connected("ro") as connection:
            known = [_text(row[0]) for row in connection.execute(query)]
        if label is None:
            return suggestion(sample or "", known, "samples")
        return suggestion(label, known, "labels")

    def samples(self, shard: str | None = None) -> Iterator[tuple[str, list[Sample]]]:
        """Each shard's name and samples, sorted by id; one shard in memory at a time."""
        with self._connected("ro") as connection:
            where, values = ("WHERE name = ?", (shard,)) if shard is not None else ("", ())
            query = f"SELECT number, name FROM shard {where} ORDER BY number"
            for number, name in connection.execute(query, values):
                rows = connection.execute(
                    "SELECT id, target, content, label FROM sample WHERE shard = ? ORDER BY id",
                    (number,),
                )
                yield _name(name), [_sample(*row) for row in rows]

    def find(self, sample: str | None = None, label: str | None = None) -> dict[str, list[str]]:
        """Shard -> ids of the samples with this id, or the same content; or with this label."""
        condition, value = (
            ("label = ?", label)
            if label is not None
            else ("content IN (SELECT content FROM sample WHERE id = ?)", sample)
        )
        found: dict[str, list[str]] = {}
        with self._connected("ro") as connection:
            query = (
                f"SELECT name, id FROM sample JOIN shard ON shard = number WHERE {condition} "
                "ORDER BY number, id"
            )
            for name, id in connection.execute(query, (value,)):
                found.setdefault(_name(name), []).append(_id(id))
        return found

    def remove(self, samples: Mapping[str, Iterable[str]]) -> None:
        """Delete samples, and shards that have none left, and overwrite their bytes in the file."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        with self._connected("rw") as connection:
            connection.execute("BEGIN IMMEDIATE")
            for name, ids in samples.items():
                row = connection.execute("SELECT number FROM shard WHERE name = ?", (name,))
                (number,) = row.fetchone()
                ids = list(ids)
                for start in range(0, len(ids), _CHUNK):
                    some = ids[start : start + _CHUNK]
                    places = ", ".join("?" * len(some))
                    connection.execute(
                        f"DELETE FROM sample WHERE shard = ? AND id IN ({places})", (number, *some)
                    )
                connection.execute("INSERT INTO removed VALUES (?, ?, ?)", (when, name, len(ids)))
            connection.execute(
                "DELETE FROM shard WHERE number NOT IN (SELECT DISTINCT shard FROM sample) "
                "AND name IN (SELECT shard FROM removed)"
            )
            connection.execute("COMMIT")

    def removed(self) -> list[Removed]:
        """What was removed so far, in order."""
        with self._connected("ro") as connection:
            rows = connection.execute('SELECT "when", shard, samples FROM removed ORDER BY rowid')
            return [Removed(_text(when), _name(shard), int(count)) for when, shard, count in rows]

    def _set(self, key: str, value: str) -> None:
        with self._connected("rw") as connection:
            connection.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (key, value))

    @contextmanager
    def _connected(self, mode: str, path: Path | None = None) -> Iterator[sqlite3.Connection]:
        path = path or self.path
        connection = None
        try:
            connection = sqlite3.connect(
                f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=30, isolation_level=None
            )
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
            yield connection
        except (sqlite3.Error, UnicodeError) as error:
            raise _clear(path, error) from error
        finally:
            if connection is not None:
                connection.close()


def _sample(id: Any, target: Any, content: Any, label: Any) -> Sample:
    if type(target) is not int or target < 0:
        raise PlanError(f"the plan has class {target!r} for {id!r}: it was edited")
    return Sample(_id(id), target, _text(content), None if label is None else _text(label))


def _id(id: Any) -> str:
    if not safe(_text(id)):
        raise PlanError(f"the plan has a sample {id!r}, no path inside its folder: it was edited")
    return id


def _name(name: Any) -> str:
    if not valid_name(_text(name)):
        raise PlanError(f"the plan has a shard {name!r}: it was edited")
    return name


def valid_name(name: str) -> bool:
    """Whether a shard may have this name, here and in a ledger."""
    return bool(name.strip()) and name.isprintable() and len(name) <= LONGEST_NAME


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PlanError(f"the plan holds {value!r} where it should have text: it was edited")
    return value


def _clear(path: Path, error: Exception) -> PlanError | OSError:
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return PlanError(f"{path}: the disk is full; nothing was changed. Make room, try again")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return PlanError(f"{path} cannot be opened ({error}): nothing was changed")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return PlanError(f"{path} is in use by another process: nothing was changed; try again")
    return PlanError(f"{path} is damaged or not a plan: {error}. Restore it from a copy")
