"""A ledger follows no links out of its folder, and leaves files of others as they are."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from ledger_contents import add, assert_holds, result
from ledger_helpers import assert_tidy, refused, shard_file, shard_folder, sum_file

from tangent_ops.composition.ledger.own_files import new_name
from tangent_ops.errors import ArgumentError, LedgerError
from tangent_ops.files import erase, opened

LOOKS_LIKE_OURS = ["0" * 32 + ".safetensors", "0123456789abcdef" * 2 + ".safetensors"]


@pytest.fixture
def precious(tmp_path):
    path = tmp_path / "precious"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"


@pytest.fixture
def at_once():
    """Waiting for a pipe's other end fails after 20 seconds."""

    def too_long(*args):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def leftover_name(ledger):
    """A file name that a killed change of this ledger could have left."""
    with ledger._records.reading() as transaction:
        return new_name(transaction.key())


def pipe(path):
    os.mkfifo(path)


def sock(path):
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(path.parent, os.O_RDONLY)  # a socket's path has at most 107 bytes
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


def folder(path):
    path.mkdir()
    (path / "inside").write_text("mine")


def link(path):
    """A link to `precious`, which is beside the ledger."""
    path.symlink_to(path.parents[2] / "precious")


OTHERS = [pipe, sock, folder]


def folder_of(ledger, place):
    return shard_folder(ledger) if place == "shards" else ledger.path / "sums"


def works(ledger):
    return [
        ledger.list,
        lambda: result(ledger),
        ledger.verify,
        ledger.rebuild,
        lambda: add(ledger, "c", 3),
        lambda: ledger.forget("a"),
        lambda: ledger.forget("a", rebuild=True),
        lambda: type(ledger)(ledger.path),
    ]


# Links


@pytest.mark.parametrize("place", ["shards", "sums"])
def test_a_link_in_place_of_a_folder(ledger, tmp_path, place, kind):
    other = kind(tmp_path / "other")
    add(other, "x", 5)
    ours, theirs = folder_of(ledger, place), folder_of(other, place)
    shutil.rmtree(ours)
    ours.symlink_to(theirs)
    concerned = works(ledger)
    del concerned[1 if place == "shards" else 0]  # which reads sums alone, or shards alone
    refused(tmp_path, rf"ledger/{ours.name} is a symbolic link", *concerned)
    assert other.verify().shards == 1


def test_a_link_in_place_of_a_shards_file(ledger, precious):
    """Even a link to the file itself is refused: the ledger could not erase its target."""
    file = shard_file(ledger, "a")
    shutil.move(file, precious.parent / "moved")
    file.symlink_to(precious.parent / "moved")
    concerned = [ledger.list, ledger.verify, *works(ledger)[5:7]]
    refused(precious.parent, rf"{file.name} is a symbolic link", *concerned)
    file.unlink()
    ledger.forget("a", rebuild=True)
    assert_holds(ledger, [2])
    ledger.verify()


def test_a_link_in_place_of_the_sum(ledger, precious):
    file = sum_file(ledger)
    file.unlink()
    file.symlink_to(precious)
    refused(precious.parent, rf"{file.name} is a symbolic link", *works(ledger)[1:7])
    file.unlink()
    ledger.rebuild()
    assert_holds(ledger, [1, 2])
    assert_tidy(type(ledger)(ledger.path))


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
def test_a_link_in_place_of_the_database(ledger, precious, suffix):
    database = ledger.path / f"ledger.sqlite{suffix}"
    if not suffix:
        shutil.move(database, precious.parent / "moved")
        database.symlink_to(precious.parent / "moved")
    else:
        database.symlink_to(precious)
    refused(precious.parent, rf"ledger\.sqlite{suffix} is a symbolic link", *works(ledger))


def test_a_link_that_leads_nowhere_makes_no_database_there(tmp_path, kind):
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "ledger.sqlite").symlink_to(tmp_path / "nowhere")
    for create in (True, False):
        with pytest.raises(LedgerError, match=r"ledger\.sqlite is a symbolic link"):
            kind(tmp_path / "ledger", create=create)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="leads nowhere"):
        kind(tmp_path / "link")
    assert not (tmp_path / "nowhere").exists()


def test_the_ledger_itself_may_be_reached_by_a_link(ledger, tmp_path, kind):
    (tmp_path / "link").symlink_to(ledger.path)
    linked = kind(tmp_path / "link", create=False)
    add(linked, "c", 3)
    linked.forget("a")
    assert_holds(ledger, [2, 3])
    assert linked.verify().shards == 2
    assert_tidy(linked)


def test_nothing_is_erased_or_read_where_a_link_comes_in_the_last_moment(tmp_path, precious):
    """A link that appears after the checks by name is not followed when the file is opened."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(precious)
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    for path in (tmp_path / "link", tmp_path / "elsewhere" / "precious", tmp_path / "folder"):
        with pytest.raises(OSError, match=r"link|elsewhere|folder"):
            erase(path)
        with pytest.raises(OSError, match=r"link|elsewhere|folder"), opened(path, own=True):
            pass
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "folder", "link", "precious"]


# Files of others


@pytest.mark.parametrize("place", ["shards", "sums"])
@pytest.mark.parametrize("name", [*LOOKS_LIKE_OURS, ".0123456789abcdef.tmp", "mine.safetensors"])
def test_a_file_that_looks_like_the_ledgers_own_is_not_erased(ledger, place, name):
    mine = folder_of(ledger, place) / name
    mine.write_text("mine")
    again = type(ledger)(ledger.path)
    again.forget("a")
    assert mine.read_text() == "mine"
    with pytest.raises(LedgerError, match=rf"1 problem:\n.*{mine.name} is not the ledger's"):
        again.verify()


def test_a_copy_of_another_ledgers_file_is_not_erased(ledger, tmp_path, kind):
    other = kind(tmp_path / "other")
    add(other, "x", 5)
    file = shard_file(other, "x")
    shutil.copy(file, shard_folder(ledger))
    type(ledger)(ledger.path)
    assert (shard_folder(ledger) / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("content", [b"", b"half", bytes(10_000)])
@pytest.mark.parametrize("place", ["shards", "sums"])
def test_what_a_killed_change_left_is_erased_however_much_of_it_there_is(ledger, place, content):
    (folder_of(ledger, place) / leftover_name(ledger)).write_bytes(content)
    with pytest.raises(LedgerError, match="was left by an interrupted change"):
        ledger.verify()
    assert_tidy(type(ledger)(ledger.path))
    ledger.verify()


@pytest.mark.parametrize("make", [*OTHERS, link])
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("place", ["shards", "sums"])
def test_what_is_no_file_is_left_alone(ledger, precious, at_once, make, ours, place):
    path = folder_of(ledger, place) / (leftover_name(ledger) if ours else LOOKS_LIKE_OURS[0])
    make(path)
    before = path.lstat()
    again = type(ledger)(ledger.path)
    add(again, "c", 3)
    again.forget("a")
    assert_holds(ledger, [2, 3])
    assert path.lstat() == before
    refused(ledger, rf"{path.name} is not the ledger's; move it elsewhere", ledger.verify)


# No regular file in the place of a file


@pytest.mark.parametrize("make", OTHERS)
def test_what_is_no_file_in_place_of_a_shards_file_or_the_sum(ledger, at_once, make):
    for file in (shard_file(ledger, "a"), sum_file(ledger)):
        content = file.read_bytes()
        file.unlink()
        make(file)
        refused(ledger, rf"{file.name} is a .*: move it elsewhere", *works(ledger)[5:7])
        refused(ledger, rf"{file.name} is a ", ledger.verify)
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        file.write_bytes(content)
    ledger.verify()


@pytest.mark.parametrize("make", OTHERS)
def test_what_is_no_file_in_place_of_the_database(ledger, at_once, make):
    (ledger.path / "ledger.sqlite").unlink()
    make(ledger.path / "ledger.sqlite")
    refused(ledger, r"ledger\.sqlite is a ", *works(ledger))


@pytest.mark.parametrize("make", [pipe, Path.touch])
def test_what_is_no_folder_in_place_of_a_folder(ledger, at_once, make):
    shutil.rmtree(ledger.path / "sums")
    make(ledger.path / "sums")
    refused(ledger, r"sums is a .*, where a ledger has a folder", *works(ledger)[1:])


# Hard links


@pytest.mark.parametrize("place", ["shards", "sums"])
def test_another_name_of_a_file_in_use_does_not_erase_it(ledger, place):
    file = shard_file(ledger, "a")
    os.link(file, folder_of(ledger, place) / LOOKS_LIKE_OURS[0])
    type(ledger)(ledger.path)  # it is not the ledger's name
    os.link(file, folder_of(ledger, place) / leftover_name(ledger))
    refused(ledger, "are one file", lambda: type(ledger)(ledger.path))
    assert_holds(ledger, [1, 2])
    assert [entry.shard for entry in ledger.list()] == ["a", "b"]


def test_two_shards_in_one_file(ledger):
    file, other = shard_file(ledger, "a"), shard_file(ledger, "b")
    content = file.read_bytes()
    file.unlink()
    os.link(other, file)
    refused(ledger, "are one file", lambda: ledger.forget("a", rebuild=True))
    file.unlink()
    file.write_bytes(content)
    assert_holds(ledger, [1, 2])
    ledger.verify()


def test_a_backup_of_hard_links_ends_with_the_shard(ledger, tmp_path, kind):
    """Forgetting overwrites the content that all hard links share (docs/promises/ledger.md)."""
    backup = tmp_path / "backup"
    shutil.copytree(ledger.path, backup, copy_function=os.link)
    (backup / "ledger.sqlite").unlink()
    shutil.copy(ledger.path / "ledger.sqlite", backup)
    file, total = shard_file(ledger, "a"), sum_file(ledger)
    ledger.forget("a")
    assert not any((backup / file.parent.name / file.name).read_bytes())
    assert not any((backup / "sums" / total.name).read_bytes())
    with pytest.raises(LedgerError, match="cannot be read"):
        kind(backup).verify()
