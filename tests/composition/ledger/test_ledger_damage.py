"""A ledger detects truncated, edited, swapped and removed files, and can be repaired."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil

import pytest
from ledger_contents import add, assert_holds, result
from ledger_helpers import (
    assert_tidy,
    edit_database,
    refused,
    shard_file,
    shard_folder,
    sum_file,
    tree,
)

from tangent_ops.composition.ledger import own_files, sealed
from tangent_ops.errors import LedgerError, TangentOpsError

SHARDS = {"a": 1, "b": 2, "c": 3}


@pytest.fixture
def ledger(ledger):
    add(ledger, "c", SHARDS["c"])
    return ledger


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b"")


def edit_values(file):
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def edit_header(file):
    """Changes a shard's or the sum's weight, or number of shards, but not the file's length."""
    content = file.read_bytes()
    edited = re.sub(rb'(\\?"(?:weight|shards)\\?":"?)[0-8]', rb"\g<1>9", content, count=1)
    assert edited != content
    file.write_bytes(edited)


def remove(file):
    file.unlink()


DAMAGES = [truncate, empty, edit_values, edit_header, remove]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_delta(ledger, damage):
    file = shard_file(ledger, "a")
    damage(file)
    works = [lambda: ledger.forget("a"), lambda: ledger.forget("b", rebuild=True)]
    refused(ledger, r"forget\('a', rebuild=True\)", *works)
    refused(ledger, rf"{file.name}.*forget\('a', rebuild=True\)", ledger.verify)
    if damage is not edit_values:  # list() reads headers
        refused(ledger, r"forget\('a', rebuild=True\)", ledger.list)
    assert_holds(ledger, SHARDS.values())  # the sum is as it was

    ledger.forget("b")
    add(ledger, "d", 4)
    ledger.forget("a", rebuild=True)
    assert_holds(ledger, [3, 4])
    assert ledger.verify().shards == 2
    assert_tidy(ledger)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_sum(ledger, damage):
    damage(sum_file(ledger))
    works = [lambda: add(ledger, "d", 4), lambda: ledger.forget("a")]
    refused(ledger, r"rebuild\(\)", lambda: result(ledger), ledger.verify, *works)
    assert len(ledger.list()) == 3

    ledger.rebuild()
    assert_holds(ledger, SHARDS.values())
    ledger.verify()
    assert_tidy(ledger)


def test_forgetting_with_rebuild_mends_a_damaged_sum_too(ledger):
    truncate(sum_file(ledger))
    truncate(shard_file(ledger, "a"))
    ledger.forget("a", rebuild=True)
    assert_holds(ledger, [2, 3])
    ledger.verify()


def test_swapped_files(ledger):
    one, other = shard_file(ledger, "a"), shard_file(ledger, "b")
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    refused(ledger, "was changed", lambda: ledger.forget("a"), ledger.list)
    other.write_bytes(content)
    refused(ledger, r"has 2 problems", ledger.verify)


def test_swapped_rows(ledger):
    edit_database(
        ledger,
        "UPDATE shards SET shard = 'x' WHERE shard = 'a'",
        "UPDATE shards SET shard = 'a' WHERE shard = 'b'",
        "UPDATE shards SET shard = 'b' WHERE shard = 'x'",
    )
    refused(ledger, "is of shard 'b', not 'a'", lambda: ledger.forget("a"))
    refused(ledger, "is of shard", ledger.verify)


def test_a_row_that_was_removed_or_leads_elsewhere(ledger, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    edit_database(ledger, "DELETE FROM shards WHERE shard = 'b'")
    refused(ledger, r"does not match the shards: the sum of", ledger.verify)
    edit_database(ledger, "UPDATE shards SET file = '../../precious' WHERE shard = 'a'")
    refused(ledger, "was edited", lambda: ledger.forget("a", rebuild=True))
    assert precious.read_text() == "mine"


def test_an_old_sum_put_back(ledger):
    """An intact old file is refused too: the database names the current one."""
    old = sum_file(ledger)
    content = old.read_bytes()
    ledger.forget("a")
    sum_file(ledger).write_bytes(content)
    refused(ledger, "was changed", lambda: result(ledger))


def test_verify_names_every_problem(ledger):
    truncate(shard_file(ledger, "a"))
    remove(shard_file(ledger, "b"))
    truncate(sum_file(ledger))
    (shard_folder(ledger) / "notes.txt").write_text("mine")
    with ledger._records.reading() as transaction:
        leftover = own_files.new_name(transaction.key())
    (ledger.path / "sums" / leftover).write_text("crash")
    before = tree(ledger.path)
    with pytest.raises(LedgerError) as error:
        ledger.verify()
    assert tree(ledger.path) == before
    head, *problems = str(error.value).splitlines()
    assert head.endswith("has 5 problems:")
    for problem, words in zip(
        problems,
        ["rebuild=True", "is missing", "rebuild()", "open the ledger again", "not the ledger's"],
        strict=True,
    ):
        assert words in problem
    # With two shards damaged, each suggested repair fails with its own error.
    (shard_folder(ledger) / "notes.txt").unlink()
    ledger = type(ledger)(ledger.path)
    with pytest.raises(LedgerError, match=r"forget\('b', rebuild=True\)"):
        ledger.forget("a", rebuild=True)  # the others are needed, and one is gone
    with pytest.raises(LedgerError):
        ledger.rebuild()


def test_a_foreign_file_is_left_alone(ledger):
    mine = shard_folder(ledger) / "notes.txt"
    mine.write_text("mine")
    type(ledger)(ledger.path).forget("a")
    assert mine.read_text() == "mine"


def test_a_damaged_database_never_gives_another_result_in_silence(ledger, tmp_path):
    database = ledger.path / "ledger.sqlite"
    content = database.read_bytes()
    used = [i for i, byte in enumerate(content) if byte]
    expected = [dataclasses.replace(entry, added="") for entry in ledger.list()]
    caught = 0
    for position in used[:: max(1, len(used) // 200)]:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(ledger.path, tmp_path / "copy")
        flipped = content[:position] + bytes([content[position] ^ 0x41]) + content[position + 1 :]
        (tmp_path / "copy" / "ledger.sqlite").write_bytes(flipped)
        try:
            copy = type(ledger)(tmp_path / "copy", create=False)
            copy.verify()
            found = [dataclasses.replace(entry, added="") for entry in copy.list()]
            assert_holds(copy, SHARDS.values())
        except TangentOpsError:
            caught += 1
            continue
        assert found == expected
    assert caught > 50


@pytest.mark.parametrize("size", [0, 1, 99, 4096, 8191])
def test_a_truncated_database(ledger, size):
    (ledger.path / "ledger.sqlite").write_bytes((ledger.path / "ledger.sqlite").read_bytes()[:size])
    shards = tree(shard_folder(ledger))
    for create in (True, False):
        with pytest.raises(LedgerError):
            type(ledger)(ledger.path, create=create).verify()
    assert tree(shard_folder(ledger)) == shards


def test_a_missing_database_leaves_the_shards(ledger):
    (ledger.path / "ledger.sqlite").unlink()
    shards = tree(shard_folder(ledger))
    with pytest.raises(LedgerError, match="holds no ledger"):
        type(ledger)(ledger.path)
    assert tree(shard_folder(ledger)) == shards


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(ledger):
    ledger.path.chmod(0o500)
    try:
        with pytest.raises(LedgerError, match="must be writable"):
            ledger.forget("a")
    finally:
        ledger.path.chmod(0o700)


def test_a_copy_without_its_empty_folders(tmp_path, kind):
    path = kind(tmp_path / "empty").path
    shard_folder(kind(path)).rmdir()
    (path / "sums").rmdir()
    ledger = kind(path, create=False)
    add(ledger, "a", 1)
    assert ledger.verify().shards == 1


@pytest.mark.parametrize("number", [1, 2])
def test_a_file_that_vanishes_while_it_is_opened(ledger, monkeypatch, number):
    """Another process may erase it after safetensors has opened it and before torch does."""
    opened = sealed.safe_open
    calls = []

    def vanishing(path, framework):
        calls.append(path)
        if len(calls) == number:
            raise RuntimeError(f"unable to open file <{path}> in read-only mode")
        return opened(path, framework=framework)

    monkeypatch.setattr(sealed, "safe_open", vanishing)
    with pytest.raises(LedgerError, match=r"cannot be read: unable to open file"):
        result(ledger)
