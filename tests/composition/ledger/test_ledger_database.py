"""A ledger detects a lost row or table in its database before it adds or forgets anything."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from ledger_contents import add, assert_holds, result
from ledger_helpers import assert_tidy, edit_database, refused, shard_folder

from tangent_ops import Ledger
from tangent_ops.errors import ArgumentError, DeltaError, LedgerError


def changes(ledger):
    return [
        lambda: add(ledger, "c", 3),
        lambda: ledger.forget("a"),
        lambda: add(type(ledger)(ledger.path, anchor="a" * 64), "c", 3),
    ]


# Rows


def test_a_sum_that_is_missing(ledger):
    edit_database(ledger, "DELETE FROM sum")
    refused(ledger, r"lost its sum.*rebuild\(\)", *changes(ledger), lambda: result(ledger))
    refused(ledger, r"names no sum.*rebuild\(\)", ledger.verify)
    type(ledger)(ledger.path).rebuild()
    assert_holds(ledger, [1, 2])
    assert_tidy(type(ledger)(ledger.path))
    ledger.verify()


def test_a_sum_that_is_missing_in_an_emptied_ledger(ledger):
    """Without the sum the ledger would accept shards of any anchor and layout."""
    for shard in ("a", "b"):
        ledger.forget(shard)
    edit_database(ledger, "DELETE FROM sum")
    refused(ledger, "lost its sum", changes(ledger)[0], lambda: result(ledger))
    refused(ledger, "names no sum", ledger.verify)


def test_a_shard_that_is_missing(ledger):
    edit_database(ledger, "DELETE FROM shards WHERE shard = 'b'")
    refused(
        ledger, r"names 1 shards, its sum is of 2: .*rebuild\(\)", *changes(ledger), lambda: result(ledger)
    )
    with pytest.raises(LedgerError, match="history does not match the shards"):
        ledger.verify()


def test_the_file_of_a_shard_that_is_missing_stays(ledger, tmp_path):
    """It may be the shard's only copy: opening must not erase it as a leftover."""
    copy = tmp_path / "ledger.sqlite"
    shutil.copy(ledger.path / "ledger.sqlite", copy)
    edit_database(ledger, "DELETE FROM shards WHERE shard = 'b'")
    type(ledger)(ledger.path)
    assert len(os.listdir(shard_folder(ledger))) == 2
    shutil.copy(copy, ledger.path / "ledger.sqlite")
    type(ledger)(ledger.path).verify()


def test_an_old_database_over_newer_files_erases_none(ledger, tmp_path):
    old = tmp_path / "ledger.sqlite"
    shutil.copy(ledger.path / "ledger.sqlite", old)
    add(ledger, "c", 3)
    new = (ledger.path / "ledger.sqlite").read_bytes()
    shutil.copy(old, ledger.path / "ledger.sqlite")
    refused(ledger, "is missing", *changes(ledger), lambda: result(ledger))
    assert len(os.listdir(shard_folder(ledger))) == 3
    (ledger.path / "ledger.sqlite").write_bytes(new)
    assert_holds(type(ledger)(ledger.path), [1, 2, 3])


@pytest.mark.parametrize("lost", ["DELETE FROM history", "DELETE FROM history WHERE number = 1"])
def test_events_that_are_missing(ledger, lost):
    edit_database(ledger, lost)
    refused(ledger, "history does not match the shards; restore the database", ledger.verify)


# Tables


@pytest.mark.parametrize("table", ["shards", "sum", "history", "names"])
@pytest.mark.parametrize(
    "damage", ["DROP TABLE {0}", "ALTER TABLE {0} RENAME TO other", "ALTER TABLE {0} ADD COLUMN x"]
)
def test_a_table_that_is_gone_or_another(ledger, table, damage):
    edit_database(ledger, damage.format(table))
    refused(
        ledger,
        rf"lacks its own '{table}'|has a foreign 'other'",
        *changes(ledger)[:2],
        lambda: result(ledger),
        ledger.list,
        ledger.history,
        ledger.verify,
        ledger.rebuild,
        lambda: len(ledger),
    )


def test_a_trigger_that_undoes_what_is_recorded(ledger):
    edit_database(
        ledger, "CREATE TRIGGER undo AFTER INSERT ON shards BEGIN DELETE FROM shards; END"
    )
    refused(ledger, "has a foreign 'undo'", *changes(ledger), lambda: result(ledger), ledger.verify)


def test_a_ledger_made_before_names_had_a_key_goes_on(ledger):
    """Opening adds a key; the ledger's files are still found and erased."""
    edit_database(ledger, "DROP TABLE names")
    ledger = type(ledger)(ledger.path)
    add(ledger, "c", 3)
    ledger.forget("a")
    assert_holds(ledger, [2, 3])
    ledger.verify()
    assert_tidy(type(ledger)(ledger.path))


def test_the_key_of_names_is_missing(ledger):
    edit_database(ledger, "DELETE FROM names")
    refused(ledger, "lost the key", *changes(ledger), ledger.verify)


# Invalid ids and tensors


@pytest.mark.parametrize("shard", ["\ud800", "a\udfff", 3, None, b"a", ("a",), "a\0"])
def test_ids_that_cannot_be_there(ledger, shard):
    add(ledger, "3", 3)
    assert shard not in ledger
    refused(ledger, "is not in the ledger", lambda: ledger.forget(shard))
    refused(ledger, "printable", lambda: add(ledger, shard, 3), error=ArgumentError)


def test_meta_with_half_a_surrogate_pair_comes_back(ledger):
    add(ledger, "c", 3, meta={"name": "a\ud800", "\udfff": 1})
    assert ledger.list()[-1].meta == {"name": "a\ud800", "\udfff": 1}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(2).to_sparse(), "w is sparse_coo, only dense"),
        (torch.ones(2).to_mkldnn(), "w is _mkldnn, only dense"),
        (torch.ones(2, device="meta"), "w is on the meta device"),
    ],
)
def test_tensors_without_plain_values(tmp_path, value, message):
    ledger = Ledger(tmp_path / "ledger")
    refused(ledger, f"shard 'a': {message}", lambda: ledger.add("a", {"w": value}))


def test_names_of_tensors_that_no_file_can_hold(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    refused(ledger, "no text", lambda: ledger.add("a", {"\ud800": torch.ones(2)}), error=DeltaError)


def test_a_folder_whose_name_is_no_utf8(tmp_path, kind):
    ledger = kind(tmp_path / os.fsdecode(b"l\xff"))
    add(ledger, "a", 1)
    add(ledger, "b", 2)
    ledger.forget("a")
    assert_holds(ledger, [2])
    assert ledger.verify().shards == 1
