"""Several processes and threads use one ledger."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from ledger_helpers import assert_is, assert_tidy, ended, fork, kill_oneself, some_delta

from tangent_ops import Ledger
from tangent_ops.errors import LedgerError


def come_and_go(path, who, steps, seed):
    """Adds shards named after `who` and forgets those with odd numbers."""
    dice = random.Random(seed)
    ledger = kind(path)
    for number in dice.sample(range(steps), steps):
        ledger.add(f"{who} {number}", some_delta(number), number + 1)
        if number % 2:
            ledger.forget(f"{who} {number}")


def left(writers, steps):
    return [(some_delta(n), n + 1) for _ in range(writers) for n in range(0, steps, 2)]


def test_processes_that_add_and_forget_at_once(tmp_path):
    path, writers, steps = tmp_path / "ledger", 4, 16
    # They also race to make the ledger.
    children = [
        fork(lambda who=who: come_and_go(path, who, steps, seed=who)) for who in range(writers)
    ]
    assert [ended(child) for child in children] == [0] * writers
    ledger = kind(path)
    assert len(ledger) == writers * steps // 2
    assert_is(result(ledger), left(writers, steps))
    assert len(ledger.history()) == writers * (steps + steps // 2)
    ledger.verify()
    assert_tidy(ledger)


def test_threads_that_add_and_forget_at_once(tmp_path):
    path, writers, steps = tmp_path / "ledger", 3, 10
    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(lambda who: come_and_go(path, who, steps, seed=who), range(writers)))
    ledger = kind(path)
    assert_is(result(ledger), left(writers, steps))
    ledger.verify()
    assert_tidy(ledger)


def test_readers_see_one_state_or_the_other(tmp_path):
    """The writer swaps "x" between two deltas: with it the mean is 1 or 3, without it 2."""
    path = tmp_path / "ledger"
    ledger = kind(path)
    size = 20_000  # large enough for a reader to meet a file in the middle of its erasure
    ledger.add("base", {"w": torch.full((size,), 2.0)})

    enough = tmp_path / "enough"

    def write():
        number = 0
        while not enough.exists():
            ledger.add("x", {"w": torch.full((size,), 4.0 if number % 2 else 0.0)})
            ledger.forget("x")
            number += 1

    child = fork(write)
    seen, lengths, reads, end = set(), set(), 0, time.monotonic() + 60
    # The number of writes between two reads depends on the machine's load.
    while (reads < 100 or len(seen) < 3 or len(lengths) < 2) and time.monotonic() < end:
        found = kind(path).composed()["w"] if reads % 2 else result(ledger)["w"]
        seen.add(tuple(found.unique().tolist()))
        lengths.add(tuple(entry.shard for entry in ledger.list()))
        reads += 1
    enough.touch()
    assert ended(child) == 0
    assert seen == {(1.0,), (2.0,), (3.0,)}
    assert lengths == {("base",), ("base", "x")}
    assert_tidy(kind(path))


def test_opening_leaves_the_files_of_a_change_under_way(one_shard):
    ledger, path = one_shard, one_shard.path
    ours, theirs = os.pipe()

    def slowly():
        from tangent_ops.composition.ledger.records import Transaction

        insert = Transaction.insert

        def slow(self, row):
            os.write(theirs, b".")  # the delta's file is there, the database knows nothing of it
            time.sleep(0.3)
            insert(self, row)

        Transaction.insert = slow
        add(ledger, "b", 2)

    child = fork(slowly)
    os.read(ours, 1)
    assert len(list((path / "deltas").iterdir())) == 2
    again = kind(path)  # waits
    assert ended(child) == 0
    again.verify()
    assert_is(result(again), [(some_delta(1), 1), (some_delta(2), 1)])


def test_a_process_that_dies_does_not_lock_the_others_out(one_shard):
    ledger = one_shard

    def die():
        with ledger._records.writing() as transaction:
            transaction.delete("a", "now")
            kill_oneself()

    assert ended(fork(die)) == -9
    began = time.monotonic()
    add(ledger, "b", 2)
    assert time.monotonic() - began < 10
    assert_is(result(ledger), [(some_delta(1), 1), (some_delta(2), 1)])


def test_one_of_two_that_add_the_same_id_is_refused(tmp_path):
    path = tmp_path / "ledger"
    kind(path)

    def add(seed):
        with ThreadPoolExecutor(1):  # a child may have threads of its own
            pass
        try:
            kind(path).add("same", some_delta(seed))
        except LedgerError as error:
            assert "is in the ledger already" in str(error)
            os._exit(7)

    for _ in range(5):
        codes = [ended(child) for child in [fork(lambda seed=seed: add(seed)) for seed in (1, 2)]]
        assert sorted(codes) == [0, 7]
        winner = some_delta(1 + codes.index(0))
        assert_is(kind(path).composed(), [(winner, 1)])
        kind(path).forget("same")
