"""A ledger that is killed with SIGKILL is as before the operation or as after it.

Run with -s to see the counts.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from ledger_helpers import (
    assert_is,
    assert_same,
    assert_tidy,
    ended,
    fork,
    kill_oneself,
    refused,
    some_delta,
    tree,
)

import tangent_ops.files
from tangent_ops import Delta, Ledger
from tangent_ops.errors import LedgerError


def state(ledger):
    """Everything that a user can see: shards, weights, meta, times, history and the mean."""
    composed = result(ledger) if len(ledger) else None
    return ledger.list(), ledger.history(), composed


def same(one, other):
    """Equal but for the times, since the operation runs more than once."""
    entries = [[(e.shard, e.weight, e.meta) for e in entries] for entries in (one[0], other[0])]
    events = [[(e.what, e.shard) for e in events] for events in (one[1], other[1])]
    if entries[0] != entries[1] or events[0] != events[1]:
        return False
    if one[2] is not None and other[2] is not None:
        assert_same(one[2], other[2])
    return (one[2] is None) == (other[2] is None)


# Killed at every call that leaves something on disk


class Doom:
    """Counts calls and kills the process at call number `fatal`."""

    def __init__(self, fatal):
        self.fatal, self.calls = fatal, 0

    def tick(self):
        if self.calls == self.fatal:
            kill_oneself()
        self.calls += 1

    def before(self, function):
        def doomed(*args, **kwargs):
            self.tick()
            return function(*args, **kwargs)

        return doomed

    def connect(self, *args, **kwargs):
        doom = self

        class Connection(sqlite3.Connection):
            def execute(self, *args):
                doom.tick()
                return super().execute(*args)

            def close(self):
                doom.tick()
                super().close()

        return CONNECT(*args, factory=Connection, **kwargs)

    def install(self):
        for name in ("fsync", "unlink", "mkdir"):
            setattr(os, name, self.before(getattr(os, name)))
        sqlite3.connect = self.connect
        # Hashing and writing call it, so some of these kills leave a file half written.
        tangent_ops.files.bytes_of = self.before(tangent_ops.files.bytes_of)


CONNECT = sqlite3.connect


def watch_statements(monkeypatch, watch):
    """Calls `watch(execute, statement)` before each statement that SQLite executes."""

    class Connection(sqlite3.Connection):
        def execute(self, statement, *args):
            watch(super().execute, statement)
            return super().execute(statement, *args)

    monkeypatch.setattr(sqlite3, "connect", partial(CONNECT, factory=Connection))


def nothing(path):
    """No ledger yet."""


def empty(path):
    kind(path)


def two(path):
    ledger = kind(path)
    ledger.add("a", some_delta(1), meta={"who": "Ada"})
    ledger.add("b", some_delta(2), weight=2.5)


def one(path):
    kind(path).add("a", some_delta(1), meta={"who": "Ada"})


def two_and_a_damaged_sum(path):
    two(path)
    (file,) = (path / "sums").iterdir()
    file.write_bytes(file.read_bytes()[:-1])


SCENARIOS = {
    "create": (nothing, lambda path: kind(path)),
    "fix the anchor": (empty, lambda path: kind(path, anchor="a" * 64)),
    "add the first": (empty, lambda path: kind(path).add("c", some_delta(3))),
    "add": (two, lambda path: kind(path).add("c", some_delta(3), 0.5, {"x": 1})),
    "forget": (two, lambda path: kind(path).forget("a")),
    "forget the last": (one, lambda path: kind(path).forget("a")),
    "forget and rebuild": (two, lambda path: kind(path).forget("a", rebuild=True)),
    "rebuild": (two_and_a_damaged_sum, lambda path: kind(path).rebuild()),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_step(name, tmp_path):
    prepare, work = SCENARIOS[name]
    start = tmp_path / "start"
    prepare(start)
    damaged = prepare is two_and_a_damaged_sum
    finished = tmp_path / "finished"
    if start.exists():
        shutil.copytree(start, finished)
    work(finished)
    after = state(kind(finished))
    before = after if damaged or not start.exists() else state(kind(start))

    outcomes = Counter()
    while True:
        path = tmp_path / "ledger"
        if start.exists():
            shutil.copytree(start, path)
        doom = Doom(fatal=outcomes.total())

        def die(path=path, doom=doom):
            doom.install()
            work(path)

        code = ended(fork(die))
        assert code in (0, -signal.SIGKILL)
        ledger = kind(path)
        if damaged:
            try:
                result(ledger)
            except LedgerError:
                ledger.rebuild()
        assert_tidy(ledger)
        found = state(ledger)
        ledger.verify()
        outcome = "after" if same(found, after) else "before"
        if outcome == "before":
            assert same(found, before)
            assert code == -signal.SIGKILL
            work(path)  # the operation can be repeated
            assert same(state(kind(path)), after)
        outcomes[outcome] += 1
        shutil.rmtree(path)
        if code == 0:
            break
    print(f"\n{name}: killed at {outcomes.total() - 1} calls, {dict(outcomes)}")
    assert outcomes.total() > 10
    if before is not after:
        seen = {"after"} if same(before, after) else {"before", "after"}
        assert outcomes.keys() == seen


# Killed at random times


@pytest.mark.parametrize("rounds", [80, pytest.param(400, marks=pytest.mark.long)])
def test_killed_at_random_times(rounds, tmp_path):
    """All rounds use one ledger, so that later rounds meet what a kill has left."""
    dice = random.Random(0)
    ledger = kind(tmp_path / "ledger")
    shards: dict[str, tuple[Delta, float]] = {}
    outcomes = Counter()
    leftovers = 0
    longest = 0.01
    for number in range(rounds):
        steps = [(f"shard {dice.randrange(6)}", dice.randrange(10**6)) for _ in range(4)]

        ours, theirs = os.pipe()

        def work(steps=steps, theirs=theirs, ledger=ledger, present=frozenset(shards)):
            for shard, seed in steps:
                if shard in present:
                    ledger.forget(shard)
                else:
                    ledger.add(shard, some_delta(seed), seed % 7 + 0.5)
                present ^= {shard}
                os.write(theirs, b".")

        child = fork(work)
        os.close(theirs)
        reported = sum(len(os.read(ours, 1)) for _ in range(dice.randrange(len(steps))))
        time.sleep(dice.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        assert code in (0, -signal.SIGKILL)
        late = len(os.read(ours, 100))
        reported += late
        os.close(ours)
        # Aim at the next step, whatever the machine's current speed.
        longest *= 1.1 if late == 0 else 0.9

        unswept = len(list((shard_folder(ledger)).iterdir()))
        ledger = type(ledger)(ledger.path)  # erases what the kill left
        leftovers += unswept - len(ledger)
        assert_tidy(ledger)
        states = [dict(shards)]
        for shard, seed in steps:
            now = dict(states[-1])
            if now.pop(shard, None) is None:
                now[shard] = some_delta(seed), seed % 7 + 0.5
            states.append(now)
        possible = states[reported : reported + 2]
        found = {entry.shard: entry.weight for entry in ledger.list()}
        which = [i for i, s in enumerate(possible) if found == {k: w for k, (_, w) in s.items()}]
        assert which, f"round {number}: neither before nor after"
        shards = possible[which[0]]
        if shards:
            assert_is(result(ledger), shards.values())
        if number % 10 == 0:
            assert ledger.verify().shards == len(shards)
        if code == 0:
            outcomes["finished"] += 1
        else:
            outcomes["after" if which[0] else "before"] += 1
    ledger.verify()
    print(f"\n{rounds} rounds: {dict(outcomes)}; {leftovers} delta files of killed changes erased")
    assert min(outcomes["before"], outcomes["after"]) > rounds / 20
    assert leftovers > rounds / 80


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

    add(one_shard, "b", 2)
    assert events == [*written("deltas"), *written("sums"), "commit", *erased("sums")]
    events.clear()
    one_shard.forget("a")
    assert events == [*written("sums"), "commit", *erased("deltas"), *erased("sums")]


# Errors on the way


def changes(ledger):
    return (lambda: add(ledger, "b", 2), lambda: ledger.forget("a"))


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
    assert_tidy(kind(one_shard.path))
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
            one_shard.add(f"{number:0200}", {n: v.clone() for n, v in some_delta(1).items()})
    assert tree(one_shard.path) == before


def test_says_so_when_an_old_file_cannot_be_erased(one_shard, monkeypatch):
    with monkeypatch.context() as patch:

        def fail(path, **options):
            raise PermissionError(1, "Operation not permitted", str(path))

        patch.setattr(os, "unlink", fail)
        with pytest.raises(LedgerError, match=r"the change is made, but .* could not be erased"):
            one_shard.forget("a")
    assert "a" not in one_shard
    assert_tidy(kind(one_shard.path))


def test_torch_is_single_threaded_here():
    assert torch.get_num_threads() == 1  # a forked child has no threads but its own
