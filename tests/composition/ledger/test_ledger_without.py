"""What a ledger gives without one of its shards, against a ledger that never had it."""

from __future__ import annotations

import pytest
from ledger_contents import add, assert_holds, assert_same, result
from ledger_helpers import tree

from tangent_ops import Ledger
from tangent_ops.errors import LedgerError


def without(ledger, shard):
    if isinstance(ledger, Ledger):
        return ledger.composed(without=shard)
    return ledger.statistics(without=shard)


def test_without_a_shard_is_as_if_it_had_never_been_added(ledger, kind, folder, tmp_path):
    add(ledger, "c", 3)
    before = tree(folder)
    found = {shard: without(ledger, shard) for shard in "abc"}
    assert tree(folder) == before
    assert_holds(ledger, [1, 2, 3])
    for number, shard in enumerate("abc", 1):
        never = kind(tmp_path / f"never {shard}")
        for seed in {1, 2, 3} - {number}:
            add(never, f"{seed}", seed)
        assert_same(found[shard], result(never))


def test_without_the_last_shard_nothing_is_left(one_shard):
    with pytest.raises(LedgerError, match="nothing to compose"):
        without(one_shard, "a")
    with pytest.raises(LedgerError, match="'b' is not in the ledger"):
        without(one_shard, "b")
