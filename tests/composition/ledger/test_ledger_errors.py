"""A ledger's files are written in an order that a power cut allows, and errors change nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ledger_contents import FOLDERS, add, numbers_of, statistics_of
from ledger_helpers import assert_tidy, refused, tree, watch_statements

from tangent_ops import StatisticsLedger
from tangent_ops.errors import LedgerError

# The order of writes, in case of a power cut


def test_files_are_on_disk_before_the_commit_and_old_ones_go_after_it(one_shard, monkeypatch):
    events: list[str] = []
    fsync, unlink = os.fsync, os.unlink

    def name(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))

    def spy_fsync(descriptor):
        path = name(descriptor)
        events.append(f"sync {path.name if path.is_dir() else 'file in ' + path.parent.name}")
        fsync(descriptor)

    def spy_unlink(file, *, dir_fd):
        path = name(dir_fd) / file
        assert not any(path.read_bytes())  # overwritten with zeros
        events.append(f"remove from {path.parent.name}")
        unlink(file, dir_fd=dir_fd)

    def spy_commit(execute, statement):
        if statement == "COMMIT":
            events.append("commit")

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "unlink", spy_unlink)
    watch_statements(monkeypatch, spy_commit)

    def written(folder):
        return [f"sync file in {folder}", f"sync {folder}"]

    def erased(folder):
        return [f"sync file in {folder}", f"remove from {folder}", f"sync {folder}"]

    shards = FOLDERS[type(one_shard)]
    add(one_shard, "b", 2)
    assert events == [*written(shards), *written("sums"), "commit", *erased("sums")]
    if isinstance(one_shard, StatisticsLedger):
        events.clear()
        one_shard.forget_samples("a", statistics_of(numbers_of(1)[:1]))
        erasures = [*erased(shards), *erased("sums")]
        assert events == [*written(shards), *written("sums"), "commit", *erasures]
    events.clear()
    one_shard.forget("a")
    assert events == [*written("sums"), "commit", *erased(shards), *erased("sums")]


# Errors on the way


def changes(ledger):
    works = [lambda: add(ledger, "b", 2), lambda: ledger.forget("a")]
    if isinstance(ledger, StatisticsLedger):
        works.append(lambda: ledger.forget_samples("a", statistics_of(numbers_of(1)[:1])))
    return works


@pytest.mark.parametrize("call", range(4))
def test_a_full_disk_changes_nothing(call, one_shard, monkeypatch):
    before = tree(one_shard.path)
    function, calls = os.fsync, []

    def fail(*args):
        calls.append(args)
        if len(calls) - 1 == call:
            raise OSError(28, "No space left on device")
        return function(*args)

    for work in changes(one_shard):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            try:
                work()
            except OSError:
                assert tree(one_shard.path) == before
            except LedgerError as error:  # after the commit
                assert "the change is made" in str(error)
                break
            else:
                break  # fewer calls than that
    assert_tidy(type(one_shard)(one_shard.path))
    one_shard.verify()


def test_an_interrupt_changes_nothing(one_shard, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt("here")

    monkeypatch.setattr("tangent_ops.composition.ledger.records.Transaction.set_sum", interrupt)
    refused(one_shard, "here", *changes(one_shard), error=KeyboardInterrupt)


def test_a_database_that_is_full_changes_nothing(one_shard, monkeypatch):
    before = tree(one_shard.path)

    def no_more_pages(execute, statement):
        if statement == "BEGIN IMMEDIATE":
            pages = execute("PRAGMA page_count").fetchone()[0]
            execute(f"PRAGMA max_page_count = {pages}")

    watch_statements(monkeypatch, no_more_pages)
    with pytest.raises(LedgerError, match=r"disk is full; nothing was changed"):
        for number in range(1000):
            before = tree(one_shard.path)
            add(one_shard, f"{number:0200}", 1)
    assert tree(one_shard.path) == before


def test_says_so_when_an_old_file_cannot_be_erased(one_shard, monkeypatch):
    with monkeypatch.context() as patch:

        def fail(path, **options):
            raise PermissionError(1, "Operation not permitted", str(path))

        patch.setattr(os, "unlink", fail)
        with pytest.raises(LedgerError, match=r"the change is made, but .* could not be erased"):
            one_shard.forget("a")
    assert "a" not in one_shard
    assert_tidy(type(one_shard)(one_shard.path))
