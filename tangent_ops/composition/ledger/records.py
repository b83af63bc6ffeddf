"""The database: which shards are present, in which files, and what happened when.

A change takes effect when the database commits. The database holds nothing of a shard's content:
weights and meta are in the shards' files, and the hashes here are of salted headers.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tangent_ops.composition.ledger.own_files import check_file, may_be_named, new_key
from tangent_ops.composition.ledger.sealed import Seal
from tangent_ops.errors import LedgerBusyError, LedgerError

BUSY_SECONDS = 30.0

# The class of a ledger -> SQLite's application id, in the database's header: "tang" and "tanS".
_APPLICATION_IDS = {"Ledger": 0x74616E67, "StatisticsLedger": 0x74616E53}
_VERSION = 1
_TABLES = {
    "shards": "CREATE TABLE shards (shard TEXT PRIMARY KEY, file TEXT NOT NULL,"
    " sha256 TEXT NOT NULL, added TEXT NOT NULL)",
    "sum": "CREATE TABLE sum (one INTEGER PRIMARY KEY CHECK (one = 1), file TEXT NOT NULL,"
    " sha256 TEXT NOT NULL)",
    "history": 'CREATE TABLE history (number INTEGER PRIMARY KEY, "when" TEXT NOT NULL,'
    " what TEXT NOT NULL, shard TEXT NOT NULL)",
    "names": "CREATE TABLE names (one INTEGER PRIMARY KEY CHECK (one = 1), key TEXT NOT NULL)",
}


@dataclass(frozen=True)
class Event:
    """Something happened to a shard.

    Attributes:
        when: in UTC, in ISO format.
        what: "added", "forgotten", or "samples forgotten", after which the shard is still there.
        shard: its id.
    """

    when: str
    what: str
    shard: str


@dataclass(frozen=True)
class Row:
    """A present shard; ``added`` is in UTC, in ISO format."""

    shard: str
    seal: Seal
    added: str


class Records:
    """The database file. Each operation opens it anew, so processes, threads and forks are safe.

    Args:
        path: the file.
        ledger: the name of the class of its ledger.
    """

    def __init__(self, path: Path, ledger: str) -> None:
        self.path = path
        self._ledger = ledger

    def create(self) -> None:
        """Make the database if there is none; raise LedgerError for a folder with other files."""
        self._check_files()
        # Checked twice, because another process may be making a ledger here at the same time.
        if not self.path.exists() and self._has_other_files() and not self.path.exists():
            raise LedgerError(
                f"{self.path.parent} holds no ledger, but other files: give a new or empty folder"
            )
        if not self.path.exists() or self._owner() == (0, 0):
            self._make_tables()
        self.check()
        with self._connected("rw") as connection, suppress(sqlite3.OperationalError):
            # The switch needs exclusive access; until then SQLite's other journal works, too.
            connection.execute("PRAGMA journal_mode = WAL")

    def found(self) -> str:
        """The name of the class of the ledger that the file is of.

        Raises:
            LedgerError: it is not a ledger's database that this release reads.
        """
        self._check_files()
        if not self.path.exists():
            raise LedgerError(f"{self.path.parent} holds no ledger: there is no {self.path.name}")
        application, version = self._owner()
        classes = [name for name, own in _APPLICATION_IDS.items() if own == application]
        if not classes:
            raise LedgerError(f"{self.path} is not a ledger's database: give another folder")
        if version != _VERSION:
            raise LedgerError(
                f"{self.path} has format version {version}, this release reads {_VERSION}: "
                "update tangent-ops"
            )
        return classes[0]

    def check(self) -> None:
        """Raise LedgerError unless the file is a database of such a ledger, as `found` does."""
        found = self.found()
        if found != self._ledger:
            raise LedgerError(
                f"{self.path.parent} is a {found}, not a {self._ledger}: open it with "
                f"tangent_ops.{found}, or give another folder"
            )
        with self._connected("rw") as connection:
            if "names" not in _made(connection):  # an older ledger, from before this table
                connection.execute("BEGIN IMMEDIATE")
                if "names" not in _made(connection):
                    _make_names(connection)
                connection.execute("COMMIT")

    def _owner(self) -> tuple[int, int]:
        with self._connected("rw") as connection:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            return application, connection.execute("PRAGMA user_version").fetchone()[0]

    def _make_tables(self) -> None:
        with self._connected("rwc") as connection:
            connection.execute("BEGIN IMMEDIATE")
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                if self._has_other_files():  # perhaps shards, which new tables would not name
                    raise LedgerError(f"{self.path} lost its content: restore it from a copy")
                for table in ("shards", "sum", "history"):
                    connection.execute(_TABLES[table])
                _make_names(connection)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_IDS[self._ledger]}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute("COMMIT")

    def _has_other_files(self) -> bool:
        return any(
            not entry.name.startswith(self.path.name) for entry in self.path.parent.iterdir()
        )

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """One state of the database, which concurrent writers do not change."""
        with self._connected("rw") as connection:
            connection.execute("BEGIN")
            self._check_tables(connection)
            yield Transaction(connection)

    @contextmanager
    def writing(self) -> Iterator[Transaction]:
        """Holds the write lock; commits at the end, and changes nothing if there is an error."""
        with self._connected("rw") as connection:
            connection.execute("BEGIN IMMEDIATE")
            self._check_tables(connection)
            yield Transaction(connection)
            connection.execute("COMMIT")

    def copy_to(self, path: Path) -> None:
        """Write the committed state into a new file, which needs no log beside it."""
        with self._connected("ro") as connection, closing(sqlite3.connect(path)) as copy:
            connection.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
            copy.execute("VACUUM")  # without the free pages

    def _check_files(self) -> None:
        # SQLite would follow a link in the database's place, and create a database at its target.
        for suffix in ("", "-wal", "-shm", "-journal"):
            check_file(self.path.with_name(self.path.name + suffix))

    def _check_tables(self, connection: sqlite3.Connection) -> None:
        # Views and triggers are refused, too: they could make a statement do other things.
        found = _made(connection)
        different = {*found.items()} ^ {*_TABLES.items()}
        if different:
            name = min(different)[0]
            what = "lacks its own" if name in _TABLES else "has a foreign"
            raise LedgerError(f"{self.path} {what} {name!r}: restore it from a copy")

    @contextmanager
    def _connected(self, mode: str) -> Iterator[sqlite3.Connection]:
        self._check_files()
        connection = None
        try:
            connection = sqlite3.connect(
                f"file:{quote(os.fsencode(self.path))}?mode={mode}",
                uri=True,
                timeout=BUSY_SECONDS,
                isolation_level=None,
            )
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
            yield connection
        except sqlite3.Error as error:
            raise _clear(self.path, error) from error
        finally:
            if connection is not None:
                connection.close()  # rolls back what is not committed


class Transaction:
    """What one connection reads and writes between BEGIN and COMMIT."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def sum(self) -> Seal | None:
        """The file of the running sum; every change writes a new one."""
        row = self._connection.execute("SELECT file, sha256 FROM sum").fetchone()
        return row and _seal(*row)

    def key(self) -> str:
        """The key of the ledger's file names, see `own_files`."""
        row = self._connection.execute("SELECT key FROM names").fetchone()
        if row is None:
            raise LedgerError("the database lost the key of its files' names: restore it")
        return row[0]

    def blank(self) -> bool:
        """Whether the ledger never had a shard."""
        found = "SELECT EXISTS (SELECT 1 FROM shards) OR EXISTS (SELECT 1 FROM history)"
        return not self._connection.execute(found).fetchone()[0]

    def shard(self, shard: object) -> Row | None:
        """A present shard, or None."""
        if not isinstance(shard, str) or not shard.isprintable():  # e.g. half a surrogate pair
            return None
        row = self._connection.execute(
            "SELECT shard, file, sha256, added FROM shards WHERE shard = ?", (shard,)
        ).fetchone()
        return row and _row(*row)

    def shards(self) -> list[Row]:
        """All present shards, the oldest first."""
        rows = self._connection.execute(
            "SELECT shard, file, sha256, added FROM shards ORDER BY rowid"
        )
        return [_row(*row) for row in rows]

    def count(self) -> int:
        """How many shards are present."""
        return self._connection.execute("SELECT count(*) FROM shards").fetchone()[0]

    def history(self) -> list[Event]:
        """All events, the oldest first."""
        rows = self._connection.execute('SELECT "when", what, shard FROM history ORDER BY number')
        return [Event(*row) for row in rows]

    def set_sum(self, seal: Seal) -> None:
        """Record a new file of the running sum."""
        self._connection.execute(
            "INSERT OR REPLACE INTO sum VALUES (1, ?, ?)", (seal.name, seal.sha256)
        )

    def insert(self, row: Row) -> None:
        """Record a shard that was added."""
        self._connection.execute(
            "INSERT INTO shards VALUES (?, ?, ?, ?)",
            (row.shard, row.seal.name, row.seal.sha256, row.added),
        )
        self._log(row.added, "added", row.shard)

    def replace(self, shard: str, seal: Seal, when: str) -> None:
        """Record the new file of a shard of which some samples were forgotten."""
        self._connection.execute(
            "UPDATE shards SET file = ?, sha256 = ? WHERE shard = ?",
            (seal.name, seal.sha256, shard),
        )
        self._log(when, "samples forgotten", shard)

    def delete(self, shard: str, when: str) -> None:
        """Record that a shard was forgotten."""
        self._connection.execute("DELETE FROM shards WHERE shard = ?", (shard,))
        self._log(when, "forgotten", shard)

    def problems(self) -> list[str]:
        """What SQLite finds wrong with the file."""
        found = [row[0] for row in self._connection.execute("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found

    def _log(self, when: str, what: str, shard: str) -> None:
        self._connection.execute(
            'INSERT INTO history ("when", what, shard) VALUES (?, ?, ?)', (when, what, shard)
        )


def _made(connection: sqlite3.Connection) -> dict[str, str]:
    """Name -> CREATE statement of every table, view, index and trigger that has one."""
    found = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {str(name): str(statement) for name, statement in found}


def _make_names(connection: sqlite3.Connection) -> None:
    connection.execute(_TABLES["names"])
    connection.execute("INSERT INTO names VALUES (1, ?)", (new_key(),))


def _row(shard: str, file: str, sha256: str, added: str) -> Row:
    return Row(shard, _seal(file, sha256), added)


def _seal(file: str, sha256: str) -> Seal:
    if not may_be_named(file):
        raise LedgerError(f"the database names a file {file!r}: it was edited. Restore it")
    return Seal(file, sha256)


def _clear(path: Path, error: sqlite3.Error) -> LedgerError:
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF  # the primary code
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
        return LedgerBusyError(
            f"{path} is in use by another process or thread for more than {BUSY_SECONDS:g} "
            "seconds: nothing was changed; try again"
        )
    if code == sqlite3.SQLITE_FULL:
        return LedgerError(f"{path}: the disk is full; nothing was changed. Make room, try again")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return LedgerError(
            f"{path} cannot be opened for writing ({error}): nothing was changed. The ledger's "
            "folder and files must be writable, even to read it"
        )
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return LedgerError(f"{path} is damaged or not a database: {error}. Restore it from a copy")
    return LedgerError(f"{path}: {error}; nothing was changed")
