"""Forgotten shards leave no trace in any file of the folder."""

from __future__ import annotations

import dataclasses
import os
import random
import secrets
import sqlite3
import struct

import pytest
import torch
from ledger_helpers import META, ended, fork, kill_oneself, refused

from tangent_ops import Delta, Ledger


def occurrences(path, patterns):
    """How many of the patterns occur in some file of the folder, its database and log included."""
    content = b"\0".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    return sum(pattern in content for pattern in patterns)


def marked(seed):
    """A delta, weight and meta, and the bytes that they leave in files: values, terms and text."""
    torch.manual_seed(seed)
    values = torch.randn(500) + 0.5
    word, weight = secrets.token_hex(8), 1 + seed / 64
    delta = Delta({"w": values}, dataclasses.replace(META, extra={"origin": "extra" + word}))
    terms = (values.double() * weight * 2**40).round().to(torch.int64)
    patterns = [
        values[:8].numpy().tobytes(),
        values[-8:].numpy().tobytes(),
        terms[:4].numpy().tobytes(),
        ("meta" + word).encode(),
        ("extra" + word).encode(),
    ]
    return delta, weight, {"text": "meta" + word}, patterns


@pytest.fixture
def ledger(folder):
    return Ledger(folder)


@pytest.fixture
def patterns(ledger):
    """Adds the shard "gone"; the bytes that it leaves in files."""
    *values, patterns = marked(1)
    ledger.add("gone", *values)
    return patterns


@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.parametrize("others", [0, 3])
def test_values_terms_and_meta_are_gone(others, rebuild, ledger, patterns):
    path = ledger.path
    assert occurrences(path, patterns) == 5
    for seed in range(others):
        ledger.add(str(seed), *marked(2 + seed)[:3])
    assert occurrences(path, patterns) == (4 if others else 5)  # a sum of several shows no term
    ledger.forget("gone", rebuild=rebuild)
    assert occurrences(path, patterns) == 0
    assert occurrences(path, [b"gone"]) == 1  # the history's


def test_gone_even_while_another_process_has_the_database_open(ledger):
    path = ledger.path
    delta, weight, meta, patterns = marked(1)
    reader = sqlite3.connect(path / "ledger.sqlite", isolation_level=None)
    reader.execute("SELECT count(*) FROM shards").fetchone()
    ledger.add("gone", delta, weight, meta)
    reader.execute("BEGIN")
    (count,) = reader.execute("SELECT count(*) FROM shards").fetchone()
    assert count == 1  # this transaction holds an old state
    ledger.forget("gone")
    assert (path / "ledger.sqlite-wal").stat().st_size > 0
    assert occurrences(path, patterns) == 0
    reader.close()


def test_gone_after_many_have_come_and_gone(ledger):
    """SQLite moves rows between pages and can leave copies of rows that are deleted later."""
    path = ledger.path
    dice, present, forgotten = random.Random(0), {}, []
    for number in range(250):
        if len(present) > 60 or (present and dice.random() < 0.3):
            shard = dice.choice(sorted(present))
            ledger.forget(shard)
            forgotten += present.pop(shard)
        else:
            delta, weight, meta, patterns = marked(number)
            present[f"{number}"] = patterns
            ledger.add(f"{number}", delta, weight, meta)
    assert len(forgotten) > 200
    assert occurrences(path, forgotten) == 0
    kept = [pattern for patterns in present.values() for pattern in patterns]
    assert occurrences(path, kept) == 4 * len(present)


def test_hashes_left_in_the_database_tell_nothing(ledger):
    """The same delta has another hash each time, so a guess cannot be checked against it."""
    delta, weight, meta, _ = marked(1)
    seals = set()
    for _ in range(3):
        ledger.add("a", delta, weight, meta)
        with ledger._records.reading() as transaction:
            row, total = transaction.shard("a"), transaction.sum()
            assert row is not None and total is not None
            seals |= {row.seal.sha256, total.sha256}
        ledger.forget("a")
    assert len(seals) == 6


def test_gone_at_the_next_opening_after_a_crash(ledger, patterns):
    path = ledger.path

    def die():
        import tangent_ops.composition.ledger.changes as changes

        changes.erase = lambda path: kill_oneself()
        ledger.forget("gone")

    assert ended(fork(die)) == -9
    assert "gone" not in ledger
    assert occurrences(path, patterns) > 0
    Ledger(path)
    assert occurrences(path, patterns) == 0


def test_files_are_overwritten_before_they_are_removed(ledger, patterns, tmp_path):
    """An open descriptor or a hard link shows zeros."""
    path = ledger.path
    (tmp_path / "links").mkdir()
    for file in [*(path / "deltas").iterdir(), *(path / "sums").iterdir()]:
        os.link(file, tmp_path / "links" / file.name)
    assert occurrences(tmp_path / "links", patterns) == 5
    ledger.forget("gone")
    contents = [file.read_bytes() for file in (tmp_path / "links").iterdir()]
    assert len(contents) == 2 and all(len(c) > 2000 and not any(c) for c in contents)


def test_a_refused_delta_leaves_nothing(ledger):
    delta, weight, meta, patterns = marked(1)
    ledger.add("a", marked(2)[0])
    refused(ledger, "'a' is in the ledger already", lambda: ledger.add("a", delta, weight, meta))
    assert occurrences(ledger.path, patterns) == 0
    assert struct.pack("<d", weight) not in (ledger.path / "ledger.sqlite").read_bytes()
