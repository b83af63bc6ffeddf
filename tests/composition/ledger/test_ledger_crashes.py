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
from dataclasses import replace

import pytest
import torch
from ledger_contents import (
    add,
    assert_holds,
    assert_same,
    numbers_of,
    result,
    statistics_of,
)
from ledger_helpers import (
    CONNECT,
    assert_tidy,
    ended,
    fork,
    kill_oneself,
    shard_folder,
)

import tangent_ops.files
from tangent_ops import Ledger, StatisticsLedger
from tangent_ops.errors import LedgerError


def state(ledger):
    """Everything that a user can see: shards, weights, meta, times, history and the result."""
    return ledger.list(), ledger.history(), result(ledger) if len(ledger) else None


def same(one, other):
    """Equal but for the times, since the operation runs more than once."""
    entries = [[replace(e, added="") for e in entries] for entries in (one[0], other[0])]
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


def nothing(kind, path):
    """No ledger yet."""


def empty(kind, path):
    kind(path)


def one(kind, path):
    add(kind(path), "a", 1, {"who": "Ada"})


def two(kind, path):
    one(kind, path)
    add(kind(path), "b", 2)


def two_and_a_damaged_sum(kind, path):
    two(kind, path)
    (file,) = (path / "sums").iterdir()
    file.write_bytes(file.read_bytes()[:-1])


def forget_samples(number):
    """Forgets so many of the samples of "a"."""
    return lambda kind, path: kind(path).forget_samples("a", statistics_of(numbers_of(1)[:number]))


# The engine of both kinds is the same: steps that differ run on both.
BOTH, DELTAS, STATISTICS = (Ledger, StatisticsLedger), (Ledger,), (StatisticsLedger,)
SCENARIOS = {
    "create": (DELTAS, nothing, lambda kind, path: kind(path)),
    "fix the anchor": (DELTAS, empty, lambda kind, path: kind(path, anchor="a" * 64)),
    "add the first": (DELTAS, empty, lambda kind, path: add(kind(path), "c", 3)),
    "add": (BOTH, two, lambda kind, path: add(kind(path), "c", 3, {"x": 1})),
    "forget": (DELTAS, two, lambda kind, path: kind(path).forget("a")),
    "forget the last": (DELTAS, one, lambda kind, path: kind(path).forget("a")),
    "forget and rebuild": (DELTAS, two, lambda kind, path: kind(path).forget("a", rebuild=True)),
    "forget a sample": (STATISTICS, two, forget_samples(1)),
    "forget all samples": (STATISTICS, one, forget_samples(3)),
    "rebuild": (DELTAS, two_and_a_damaged_sum, lambda kind, path: kind(path).rebuild()),
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for name, (kinds, *_) in SCENARIOS.items() for kind in kinds]
)
def test_killed_at_every_step(kind, name, tmp_path):
    _, prepare, work = SCENARIOS[name]
    start = tmp_path / "start"
    prepare(kind, start)
    damaged = prepare is two_and_a_damaged_sum
    finished = tmp_path / "finished"
    if start.exists():
        shutil.copytree(start, finished)
    work(kind, finished)
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
            work(kind, path)

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
            work(kind, path)  # the operation can be repeated
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


def wait_for_write(ledger, child):
    """Returns when SQLite's log has grown, which a commit does, or when the child has ended."""
    log = ledger.path / "ledger.sqlite-wal"
    size = None
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        try:
            found = log.stat().st_size
        except FileNotFoundError:
            found = 0
        if size is not None and found > size:
            break
        size = found


@pytest.mark.parametrize(
    ("kind", "rounds"),
    [
        (Ledger, 80),
        (StatisticsLedger, 80),
        pytest.param(Ledger, 400, marks=pytest.mark.long),
        pytest.param(StatisticsLedger, 400, marks=pytest.mark.long),
    ],
)
def test_killed_at_random_times(kind, rounds, tmp_path):
    """All rounds use one ledger, so that later rounds meet what a kill has left."""
    dice = random.Random(0)
    ledger = kind(tmp_path / "ledger")
    shards: dict[str, int] = {}
    outcomes = Counter()
    leftovers = 0
    longest = {False: 0.01, True: 0.001}

    def met_all():
        """Whether kills met both sides of a commit, and files that no commit names yet."""
        sides = min(outcomes["before"], outcomes["after"])
        return sides > rounds / 20 and leftovers > rounds / 80

    # Where a busy machine lets too few do so, there are more rounds.
    for number in range(10 * rounds):
        if number >= rounds and met_all():
            break
        steps = [(f"shard {dice.randrange(6)}", dice.randrange(10**6)) for _ in range(4)]

        ours, theirs = os.pipe()

        def work(steps=steps, theirs=theirs, ledger=ledger, present=frozenset(shards)):
            for shard, seed in steps:
                if shard in present:
                    ledger.forget(shard)
                else:
                    add(ledger, shard, seed)
                present ^= {shard}
                os.write(theirs, b".")

        child = fork(work)
        os.close(theirs)
        reported = sum(len(os.read(ours, 1)) for _ in range(dice.randrange(len(steps))))
        commit = number % 2 == 1  # what follows one is short: few kills would meet it by chance
        if commit:
            wait_for_write(ledger, child)
        time.sleep(dice.uniform(0, longest[commit]))
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        assert code in (0, -signal.SIGKILL)
        late = len(os.read(ours, 100))
        reported += late
        os.close(ours)
        # Aim at the step's end, whatever the machine's current speed.
        longest[commit] *= 1.1 if late == 0 else 0.9

        unswept = len(list(shard_folder(ledger).iterdir()))
        ledger = type(ledger)(ledger.path)  # erases what the kill left
        leftovers += unswept - len(ledger)
        assert_tidy(ledger)
        states = [dict(shards)]
        for shard, seed in steps:
            now = dict(states[-1])
            if now.pop(shard, None) is None:
                now[shard] = seed
            states.append(now)
        possible = states[reported : reported + 2]
        found = {entry.shard for entry in ledger.list()}
        which = [i for i, s in enumerate(possible) if found == s.keys()]
        assert which, f"round {number}: neither before nor after"
        shards = possible[which[0]]
        if shards:
            assert_holds(ledger, shards.values())
        if number % 10 == 0:
            assert ledger.verify().shards == len(shards)
        if code == 0:
            outcomes["finished"] += 1
        else:
            outcomes["after" if which[0] else "before"] += 1
    ledger.verify()
    print(f"\n{outcomes.total()} rounds: {dict(outcomes)}; {leftovers} killed changes left a shard")
    assert met_all()


def test_torch_is_single_threaded_here():
    assert torch.get_num_threads() == 1  # a forked child has no threads but its own
