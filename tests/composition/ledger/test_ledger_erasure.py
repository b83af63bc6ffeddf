"""Forgotten shards leave no trace in any file of the folder."""

from __future__ import annotations

import dataclasses
import os
import random
import secrets
import sqlite3

import pytest
import torch
from ledger_contents import META, SAMPLES, add, numbers_of, some_statistics, statistics_of
from ledger_helpers import ended, fork, kill_oneself, refused, shard_folder

from tangent_ops import Delta, Ledger, StatisticsLedger


def occurrences(path, patterns):
    """How many of the patterns occur in some file of the folder, its database and log included."""
    content = b"\0".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    return sum(pattern in content for pattern in patterns)


def marked(ledger, shard, seed):
    """Adds a shard; the bytes that it leaves in files: values, terms and text."""
    torch.manual_seed(seed)
    word = secrets.token_hex(8)
    meta = {"text": "meta" + word}
    if isinstance(ledger, Ledger):
        values, weight = torch.randn(500) + 0.5, 1 + seed / 64
        origin = dataclasses.replace(META, extra={"origin": "extra" + word})
        ledger.add(shard, Delta({"w": values}, origin), weight, meta)
        terms = (values.double() * weight * 2**40).round().to(torch.int64)
        own = [values[:8], values[-8:], terms[:4]]
        return [*map(as_bytes, own), ("meta" + word).encode(), ("extra" + word).encode()]
    statistics = some_statistics(seed)
    ledger.add(shard, statistics, meta)
    assert statistics.digests is not None
    own = [*statistics.digests[:2], *(statistics.terms[n].flatten()[:3] for n in TERMS)]
    return [*map(as_bytes, own), ("meta" + word).encode()]


TERMS = ("core_core", "core_head")


def as_bytes(tensor):
    return tensor.numpy().tobytes()


@pytest.fixture
def ledger(folder, kind):
    return kind(folder)


@pytest.fixture
def patterns(ledger):
    """Adds the shard "gone"; the bytes that it leaves in files."""
    return marked(ledger, "gone", 1)


@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.parametrize("others", [0, 3])
def test_values_terms_and_meta_are_gone(others, rebuild, ledger, patterns):
    path = ledger.path
    assert occurrences(path, patterns) == 5
    for seed in range(others):
        marked(ledger, str(seed), 2 + seed)
    # A sum of several deltas shows no term; a file of statistics does.
    assert occurrences(path, patterns) == (4 if others and isinstance(ledger, Ledger) else 5)
    ledger.forget("gone", rebuild=rebuild)
    assert occurrences(path, patterns) == 0
    assert occurrences(path, [b"gone"]) == 1  # the history's


def test_gone_even_while_another_process_has_the_database_open(ledger):
    path = ledger.path
    reader = sqlite3.connect(path / "ledger.sqlite", isolation_level=None)
    reader.execute("SELECT count(*) FROM shards").fetchone()
    patterns = marked(ledger, "gone", 1)
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
            present[f"{number}"] = marked(ledger, f"{number}", number)
    assert len(forgotten) > 200
    assert occurrences(path, forgotten) == 0
    kept = [pattern for patterns in present.values() for pattern in patterns]
    assert occurrences(path, kept) == (4 if isinstance(ledger, Ledger) else 5) * len(present)


def test_hashes_left_in_the_database_tell_nothing(ledger):
    """The same shard has another hash each time, so a guess cannot be checked against it."""
    seals = set()
    for _ in range(3):
        add(ledger, "a", 1, {"text": "same"})
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
    type(ledger)(path)
    assert occurrences(path, patterns) == 0


def test_files_are_overwritten_before_they_are_removed(ledger, patterns, tmp_path):
    """An open descriptor or a hard link shows zeros."""
    path = ledger.path
    (tmp_path / "links").mkdir()
    for file in [*shard_folder(ledger).iterdir(), *(path / "sums").iterdir()]:
        os.link(file, tmp_path / "links" / file.name)
    assert occurrences(tmp_path / "links", patterns) == 5
    ledger.forget("gone")
    contents = [file.read_bytes() for file in (tmp_path / "links").iterdir()]
    assert len(contents) == 2 and all(len(c) > 1000 and not any(c) for c in contents)


def test_a_refused_shard_leaves_nothing(ledger, tmp_path):
    patterns = marked(type(ledger)(tmp_path / "other"), "a", 1)
    add(ledger, "a", 2)
    message = "'a' is in the ledger already"
    refused(ledger, message, lambda: add(ledger, "a", 1, {"text": "metaword"}))
    assert occurrences(ledger.path, [*patterns, b"metaword"]) == 0


@pytest.mark.parametrize("number", [1, SAMPLES])
def test_what_forgotten_samples_left_is_gone(folder, number):
    """The digests of the samples, and all previous sums, of one shard and of all."""
    ledger = StatisticsLedger(folder)
    add(ledger, "other", 2)
    patterns = marked(ledger, "gone", 1)
    samples = list(numbers_of(1))
    terms = [
        as_bytes(statistics_of(some).terms["core_head"])
        for some in (samples, [*samples, *numbers_of(2)], samples[:number])
    ]
    digests = statistics_of(samples[:number]).digests
    assert digests is not None
    gone = [*terms, *map(as_bytes, digests)]
    assert occurrences(folder, gone) >= 2 + number
    ledger.forget_samples("gone", statistics_of(samples[:number]))
    assert occurrences(folder, gone) == 0
    text = [patterns[-1]]  # meta, which stays with what is left of the shard
    assert occurrences(folder, text) == (0 if number == SAMPLES else 1)
    assert [event.what for event in ledger.history()][2:] == [
        "forgotten" if number == SAMPLES else "samples forgotten"
    ]
