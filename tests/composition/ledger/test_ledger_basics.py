"""Results, meta, refusals, anchor and folder of a ledger of deltas."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sqlite3
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from functools import partial

import pytest
import torch
from ledger_contents import META, assert_is, assert_same, some_delta
from ledger_helpers import assert_tidy, refused, tree
from small_models import tiny_vit

import tangent_ops
from tangent_ops import Delta, DeltaMeta, Ledger, load_delta, save_delta
from tangent_ops.composition.ledger import Event, Verified
from tangent_ops.errors import (
    ArgumentError,
    DeltaError,
    DeltaFileError,
    LedgerBusyError,
    LedgerError,
)


def tiny_model(seed=0, **options):
    return tangent_ops.linearize(tiny_vit(seed, depth=1), "head", **options)


@pytest.fixture
def kind():
    return Ledger


# Results


def test_a_file_counts_as_its_delta(ledger, tmp_path):
    save_delta(some_delta(3), tmp_path / "delta")
    ledger.add("file", tmp_path / "delta", weight=3)
    ledger.add("path", str(tmp_path / "delta"))
    both = [(some_delta(3), 3), (some_delta(3), 1)]
    assert_is(ledger.composed(), [(some_delta(1), 1), (some_delta(2), 2.5), *both])


def test_gradients_and_strides_do_not_matter(folder):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    ledger = Ledger(folder)
    ledger.add("a", {"w": weight.t()})
    assert torch.equal(ledger.composed()["w"], weight.detach().t())


def test_lists_shards_with_weight_time_and_meta(ledger):
    one, two = ledger.list()
    assert (one.shard, one.weight) == ("a", 1.0)
    assert one.meta == {"who": "Ada", "n": 3, "x": 0.5, "ok": True, "no": None}
    assert (two.shard, two.weight, two.meta) == ("b", 2.5, {})
    age = datetime.now(UTC) - datetime.fromisoformat(one.added)
    assert timedelta(0) <= age < timedelta(minutes=1)
    assert len(ledger) == 2 and "a" in ledger and "c" not in ledger and 1 not in ledger


def test_origins_are_the_metas_that_the_deltas_came_with(folder):
    low_rank = DeltaMeta("a" * 64, "vit", "head", rank=2, basis="b" * 64, extra={"x": "y"})
    metas = {"b": low_rank, "a": dataclasses.replace(low_rank, shard="1", extra={}), "c": None}
    ledger = Ledger(folder)
    for shard, meta in metas.items():
        ledger.add(shard, some_delta(0, None) if meta is None else Delta(some_delta(0), meta))
    assert list(ledger.origins().items()) == list(metas.items())
    ledger.forget("b")
    assert list(ledger.origins()) == ["a", "c"]
    (folder / "deltas" / min(os.listdir(folder / "deltas"))).unlink()
    with pytest.raises(LedgerError, match=r"is missing; restore .* or forget\("):
        ledger.origins()


def test_history_says_what_happened_and_nothing_else(ledger):
    ledger.forget("a")
    ledger.add("a", some_delta(3))
    events = ledger.history()
    assert [(event.what, event.shard) for event in events] == [
        ("added", "a"), ("added", "b"), ("forgotten", "a"), ("added", "a"),
    ]  # fmt: skip
    assert [field.name for field in dataclasses.fields(Event)] == ["when", "what", "shard"]
    assert all(datetime.fromisoformat(event.when).utcoffset() == timedelta(0) for event in events)


def test_everything_is_there_after_opening_again(ledger, folder):
    again = Ledger(folder, create=False)
    assert_same(again.composed(), ledger.composed())
    assert again.list() == ledger.list() and again.history() == ledger.history()
    again.forget("b")
    assert "b" not in ledger  # nothing is kept in memory


def assert_empty(ledger):
    assert len(ledger) == 0 and ledger.list() == []
    assert ledger.verify() == Verified(0, 0.0, 0)
    with pytest.raises(LedgerError, match="nothing to compose"):
        ledger.composed()


def test_an_emptied_ledger_keeps_anchor_and_layout(ledger):
    ledger.forget("a")
    ledger.forget("b")
    assert_empty(ledger)
    with pytest.raises(DeltaError, match="another anchor"):
        ledger.add("a", some_delta(1, dataclasses.replace(META, anchor="b" * 64)))
    with pytest.raises(DeltaError, match=r"missing head\.bias"):
        ledger.add("a", {"w": torch.ones(1)})
    ledger.add("a", some_delta(1))
    assert_is(ledger.composed(), [(some_delta(1), 1)])


def test_a_new_ledger_is_empty(folder):
    ledger = Ledger(folder)
    assert_empty(ledger)
    assert ledger.history() == []


def test_the_stored_files_are_delta_files(ledger, folder):
    for entry, delta in zip(ledger.list(), (some_delta(1), some_delta(2)), strict=True):
        stored = [load_delta(file) for file in (folder / "deltas").iterdir()]
        metas = [one.meta for one in stored if all(torch.equal(one[n], delta[n]) for n in delta)]
        assert len(metas) == 1 and metas[0] is not None
        assert json.loads(metas[0].extra["ledger"])["shard"] == entry.shard
        assert metas[0].anchor == META.anchor


def test_verify_reports_what_it_read(ledger, folder):
    size = sum(file.stat().st_size for file in (folder / "deltas").iterdir())
    assert ledger.verify() == Verified(2, 3.5, size)


# Meta


def test_meta_of_the_mean_is_that_of_the_present_shards(folder):
    metas = {
        "a": DeltaMeta("a" * 64, "vit", "head", loss="square", shard="1", extra={"x": "y"}),
        "b": DeltaMeta("a" * 64, "big", "last", loss="square"),
        "c": DeltaMeta("a" * 64, "vit", "head", loss="other"),
    }
    ledger = Ledger(folder)
    for shard, meta in metas.items():
        ledger.add(shard, some_delta(0, meta))
    assert ledger.composed().meta == DeltaMeta("a" * 64, "big", "head")
    ledger.forget("c")
    assert ledger.composed().meta == DeltaMeta("a" * 64, "big", "head", loss="square")
    ledger.forget("b")
    assert ledger.composed().meta == DeltaMeta("a" * 64, "vit", "head", loss="square")
    ledger.add("d", some_delta(0, None))
    assert ledger.composed().meta is None
    ledger.forget("d")
    ledger.forget("a")
    ledger.add("b", some_delta(0, metas["b"]))
    assert ledger.composed().meta == DeltaMeta("a" * 64, "big", "last", loss="square")


def test_low_rank_deltas_keep_rank_and_basis(folder):
    tangent = tiny_model(rank=2)
    ledger = Ledger(folder, anchor=tangent)
    ledger.add("a", tangent.delta_dict())
    meta = ledger.composed().meta
    assert meta is not None and (meta.rank, meta.basis) == (2, tangent.basis_fingerprint)


def test_the_mean_goes_into_the_model_and_a_file(folder, tmp_path):
    tangent = tiny_model()
    deltas = [
        Delta({n: torch.randn_like(v) for n, v in tangent.delta_dict().items()},
              tangent.delta_dict().meta)
        for _ in range(2)
    ]  # fmt: skip
    ledger = Ledger(folder, anchor=tangent)
    for index, delta in enumerate(deltas):
        ledger.add(str(index), delta)
    tangent.load_delta_dict(ledger.composed())
    save_delta(ledger.composed(), tmp_path / "mean")
    assert_same(load_delta(tmp_path / "mean", anchor=tangent.fingerprint), ledger.composed())
    mean = tangent_ops.compose(deltas)
    assert all(torch.allclose(mean[n], v, atol=1e-7) for n, v in ledger.composed().items())


# Refusals, which change nothing


BAD = {
    "printable": [{"shard_id": shard} for shard in ("", " ", "a\nb", "\ud800", 3, None)],
    "at most 200": [{"shard_id": "x" * 201}],
    "weight": [
        {"weight": weight}
        for weight in (0, -1, math.nan, math.inf, "1", None, 10**400, 1j, torch.ones(2))
    ],
    "meta": [{"meta": meta} for meta in ({1: "a"}, {"a": [1]}, {"a": math.nan}, {"a": b"x"})],
}


@pytest.mark.parametrize(
    ("message", "wrong"), [(message, wrong) for message, all_ in BAD.items() for wrong in all_]
)
def test_refuses_an_argument(ledger, folder, message, wrong):
    given = {"shard_id": "c", "delta": some_delta(3), **wrong}
    refused(folder, message, lambda: ledger.add(**given), error=ArgumentError)


def test_weights_and_ids_may_be_unusual(folder):
    ledger = Ledger(folder)
    ledger.add("x" * 200, some_delta(1), weight=Fraction(1, 3))
    ledger.add("Füchse/../%?#'\" 狐", some_delta(2), weight=True)
    assert [entry.weight for entry in ledger.list()] == [1 / 3, 1.0]
    ledger.forget("Füchse/../%?#'\" 狐")
    assert_is(ledger.composed(), [(some_delta(1), 1 / 3)])
    assert_tidy(ledger)


def test_refuses_to_forget_an_unknown_id(ledger, folder):
    refused(folder, "'c' is not in the ledger", lambda: ledger.forget("c"))
    ledger.forget("a")
    refused(folder, "'a' is not in the ledger", lambda: ledger.forget("a"))


OTHER = {
    "anchor": (some_delta(3, dataclasses.replace(META, anchor="b" * 64)), "'c' belongs to another"),
    "rank": (some_delta(3, dataclasses.replace(META, rank=2, basis="c")), "is of rank 2, expected"),
    "name": (some_delta(3) | {"more": torch.ones(1)}, "unexpected more"),
    "shape": (some_delta(3) | {"scale": torch.ones(1).bfloat16()}, r"scale has shape \(1,\)"),
    "dtype": (some_delta(3) | {"scale": torch.tensor(1.0)}, "scale is float32, the ledger's bfl"),
    "int": (some_delta(3) | {"scale": torch.tensor(1)}, "scale is torch.int64; supported are"),
    "nan": (some_delta(3) | {"scale": torch.tensor(torch.nan).bfloat16()}, "not finite in scale"),
    "inf": (some_delta(3) | {"scale": torch.tensor(torch.inf).bfloat16()}, "not finite in scale"),
    "empty": ({}, "no tensors"),
}


@pytest.mark.parametrize(("delta", "message"), OTHER.values(), ids=OTHER)
def test_refuses_a_delta_that_does_not_fit(ledger, folder, delta, message):
    refused(folder, message, lambda: ledger.add("c", delta), error=DeltaError)


def test_refuses_what_is_no_delta(ledger, folder, tmp_path):
    path = tmp_path / "delta"
    add_file = partial(ledger.add, "c", path)
    refused(folder, "a dict of tensors or a path", lambda: ledger.add("c", 3), error=ArgumentError)
    refused(folder, "delta", add_file, error=FileNotFoundError)
    save_delta(some_delta(3), path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    refused(folder, "truncated", add_file, error=DeltaFileError)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(folder, "was changed", add_file, error=DeltaFileError)


def test_the_first_delta_must_be_one_that_can_be_stored(folder):
    ledger = Ledger(folder)
    reserved = {"__metadata__": torch.ones(1)}
    refused(folder, "reserved", lambda: ledger.add("a", reserved), error=DeltaError)
    ledger.add("a", {"w": torch.ones(1)})  # the refused delta's layout was not kept


# The anchor


def test_the_first_delta_fixes_the_anchor_even_after_plain_dicts(folder):
    ledger = Ledger(folder)
    ledger.add("plain", some_delta(1, None))
    ledger.add("a", some_delta(2))
    with pytest.raises(DeltaError, match="another anchor"):
        ledger.add("b", some_delta(3, dataclasses.replace(META, anchor="b" * 64)))
    ledger.add("plain too", some_delta(3, None))


def test_a_fingerprint_fixes_the_anchor(folder):
    ledger = Ledger(folder, anchor="a" * 64)
    with pytest.raises(DeltaError, match=r"another anchor: b{12} \(tiny\), expected a{12}"):
        ledger.add("b", some_delta(3, dataclasses.replace(META, anchor="b" * 64)))
    Ledger(folder).add("a", some_delta(1))
    for good in (Ledger(folder), Ledger(folder, anchor="a" * 64)):
        assert len(good) == 1
    refused(folder, "another anchor", lambda: Ledger(folder, anchor="b" * 64), error=DeltaError)


def test_a_model_fixes_everything(folder):
    tangent = tiny_model()
    delta = tangent.delta_dict()
    ledger = Ledger(folder, anchor=tangent)
    double = {name: value.double() for name, value in delta.items()}
    for wrong, message in (
        (some_delta(1, None), "missing head.weight|unexpected|shape"),
        (Delta(delta, tiny_model(seed=1).delta_dict().meta), "another anchor"),
        (double, "is float64, the ledger's float32"),
        (tiny_model(rank=2).delta_dict(), "is of rank 2"),
    ):
        with pytest.raises(DeltaError, match=message):
            ledger.add("a", wrong)
    ledger.add("a", delta)
    for model, message in ((tiny_model(1), "another anchor"), (tiny_model(rank=2), "of rank 2")):
        work = partial(Ledger, folder, anchor=model)
        refused(folder, message, work, error=DeltaError)
    before = tree(folder)
    Ledger(folder, anchor=tangent)
    assert tree(folder) == before


def test_a_model_that_comes_later_fixes_what_is_open(folder):
    tangent = tiny_model()
    Ledger(folder).add("a", {n: torch.randn_like(v) for n, v in tangent.delta_dict().items()})
    other = tangent_ops.linearize(tangent.anchor, "norm")
    refused(folder, "unexpected|missing", lambda: Ledger(folder, anchor=other), error=DeltaError)
    ledger = Ledger(folder, anchor=tangent)
    with pytest.raises(DeltaError, match="another anchor"):
        ledger.add("b", tiny_model(seed=1).delta_dict())
    assert ledger.verify().shards == 1


def test_refuses_an_anchor_of_another_kind(folder):
    with pytest.raises(ArgumentError, match="got a Linear"):
        Ledger(folder, anchor=torch.nn.Linear(1, 1))
    assert not folder.exists()


# The folder


def test_refuses_a_folder_that_holds_none_if_it_must_not_make_one(tmp_path):
    with pytest.raises(LedgerError, match="holds no ledger"):
        Ledger(tmp_path / "missing", create=False)
    with pytest.raises(LedgerError, match="holds no ledger"):
        Ledger(tmp_path, create=False)
    assert os.listdir(tmp_path) == []


def test_refuses_a_folder_of_other_files_and_touches_none(tmp_path):
    (tmp_path / "deltas").mkdir()
    mine = tmp_path / "deltas" / ("0" * 32 + ".safetensors")
    mine.write_text("precious")
    refused(tmp_path, "other files", lambda: Ledger(tmp_path))
    refused(tmp_path, "is a file", lambda: Ledger(mine), error=ArgumentError)


def test_refuses_another_database(tmp_path):
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    connection.close()
    refused(tmp_path, "not a ledger's database", lambda: Ledger(tmp_path))
    (tmp_path / "ledger.sqlite").write_bytes(b"dear diary, " * 1000)
    refused(tmp_path, "not a database", lambda: Ledger(tmp_path))


def test_refuses_a_later_format(ledger, folder):
    connection = sqlite3.connect(folder / "ledger.sqlite")
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(LedgerError, match=r"format version 2.*update"):
        Ledger(folder)


def test_says_so_when_it_is_busy(ledger, folder, monkeypatch):
    monkeypatch.setattr("tangent_ops.composition.ledger.records.BUSY_SECONDS", 0.05)
    connection = sqlite3.connect(folder / "ledger.sqlite", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    works = (lambda: ledger.add("c", some_delta(3)), lambda: ledger.forget("a"))
    refused(folder, "in use.*try again", *works, error=LedgerBusyError)
    assert len(Ledger(folder)) == len(Ledger(folder, create=False)) == 2  # reading does not wait
    assert len(ledger.list()) == 2
    assert_is(ledger.composed(), [(some_delta(1), 1), (some_delta(2), 2.5)])
    connection.close()
    ledger.forget("a")
    assert_tidy(ledger)


def test_the_log_is_a_wal_and_commits_are_synced(ledger, folder):
    connection = sqlite3.connect(folder / "ledger.sqlite")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    with ledger._records.writing() as transaction:
        ask = transaction._connection.execute
        assert ask("PRAGMA synchronous").fetchone() == (2,)
        assert ask("PRAGMA secure_delete").fetchone() == (1,)
