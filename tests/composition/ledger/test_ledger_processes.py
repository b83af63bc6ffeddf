"""Several processes and threads use one ledger."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from ledger_contents import STATISTICS_META, add, assert_holds, result
from ledger_helpers import assert_tidy, ended, fork, kill_oneself, shard_folder

from tangent_ops import Ledger, TangentStatistics
from tangent_ops.errors import LedgerError


def come_and_go(kind, path, who, steps, seed):
    """Adds shards named after `who` and forgets those with odd numbers."""
    dice = random.Random(seed)
    ledger = kind(path)
    for number in dice.sample(range(steps), steps):
        add(ledger, f"{who} {number}", number)
        if number % 2:
            ledger.forget(f"{who} {number}")


def left(writers, steps):
    return [*range(0, steps, 2)] * writers


def test_processes_that_add_and_forget_at_once(tmp_path, kind):
    path, writers, steps = tmp_path / "ledger", 4, 16
    # They also race to make the ledger.
    children = [
        fork(lambda who=who: come_and_go(kind, path, who, steps, seed=who))
        for who in range(writers)
    ]
    assert [ended(child) for child in children] == [0] * writers
    ledger = kind(path)
    assert len(ledger) == writers * steps // 2
    assert_holds(ledger, left(writers, steps))
    assert len(ledger.history()) == writers * (steps + steps // 2)
    ledger.verify()
    assert_tidy(ledger)


def test_threads_that_add_and_forget_at_once(tmp_path, kind):
    path, writers, steps = tmp_path / "ledger", 3, 10
    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(lambda who: come_and_go(kind, path, who, steps, seed=who), range(writers)))
    ledger = kind(path)
    assert_holds(ledger, left(writers, steps))
    ledger.verify()
    assert_tidy(ledger)


def large(kind, value):
    """A shard of equal values, so large that readers meet its file in the middle of its erasure."""
    if kind is Ledger:
        return {"w": torch.full((20_000,), float(value))}
    layout = (("core", "float32", (200,)), *STATISTICS_META.layout[1:])
    empty = TangentStatistics.zero(dataclasses.replace(STATISTICS_META, layout=layout))
    terms = {name: torch.full_like(term, value) for name, term in empty.terms.items()}
    return TangentStatistics(empty.meta, terms, torch.tensor([1, 0, 0]), reach=value)


def values(found):
    """The values in a result."""
    tensor = found["w"] if isinstance(found, dict) else found.terms["core_core"]
    return tuple(tensor.unique().tolist())


def test_readers_see_one_state_or_the_other(tmp_path, kind):
    """The writer swaps "x" between two shards: the result is of 2 alone, 2 and 1, or 2 and 4."""
    path = tmp_path / "ledger"
    ledger = kind(path)
    ledger.add("base", large(kind, 2))

    enough = tmp_path / "enough"

    def write():
        number = 0
        while not enough.exists():
            ledger.add("x", large(kind, 4 if number % 2 else 1))
            ledger.forget("x")
            number += 1

    child = fork(write)
    seen, lengths, reads, end = set(), set(), 0, time.monotonic() + 60
    # The number of writes between two reads depends on the machine's load.
    while (reads < 100 or len(seen) < 3 or len(lengths) < 2) and time.monotonic() < end:
        seen.add(values(result(kind(path) if reads % 2 else ledger)))
        lengths.add(tuple(entry.shard for entry in ledger.list()))
        reads += 1
    enough.touch()
    assert ended(child) == 0
    assert seen == ({(2.0,), (1.5,), (3.0,)} if kind is Ledger else {(2,), (3,), (6,)})
    assert lengths == {("base",), ("base", "x")}
    assert_tidy(kind(path))


def test_opening_leaves_the_files_of_a_change_under_way(one_shard):
    ledger, path = one_shard, one_shard.path
    ours, theirs = os.pipe()

    def slowly():
        from tangent_ops.composition.ledger.records import Transaction

        insert = Transaction.insert

        def slow(self, row):
            os.write(theirs, b".")  # the shard's file is there, the database knows nothing of it
            time.sleep(0.3)
            insert(self, row)

        Transaction.insert = slow
        add(ledger, "b", 2)

    child = fork(slowly)
    os.read(ours, 1)
    assert len(list(shard_folder(ledger).iterdir())) == 2
    again = type(ledger)(path)  # waits
    assert ended(child) == 0
    again.verify()
    assert_holds(again, [1, 2])


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
    assert_holds(ledger, [1, 2])


def test_one_of_two_that_add_the_same_id_is_refused(tmp_path, kind):
    path = tmp_path / "ledger"
    kind(path)

    def try_to_add(seed):
        with ThreadPoolExecutor(1):  # a child may have threads of its own
            pass
        try:
            add(kind(path), "same", seed)
        except LedgerError as error:
            assert "is in the ledger already" in str(error)
            os._exit(7)

    for _ in range(5):
        codes = [
            ended(child) for child in [fork(lambda seed=seed: try_to_add(seed)) for seed in (1, 2)]
        ]
        assert sorted(codes) == [0, 7]
        assert_holds(kind(path), [1 + codes.index(0)])
        kind(path).forget("same")
