"""`push_to_hub` and `pull_from_hub` against a fake server; `save_pretrained` against a folder."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import Repositories, serving
from torch import Tensor
from torch.utils.data import TensorDataset

import tangent_ops
from tangent_ops import (
    Delta,
    DeltaMeta,
    Ledger,
    StatisticsLedger,
    load_delta,
    push_to_hub,
    save_delta,
    save_pretrained,
    statistics,
)
from tangent_ops.errors import ArgumentError, DeltaError, DeltaFileError, LedgerError
from tangent_ops.model.linearize import linearize

constants = pytest.importorskip("huggingface_hub.constants")
ANCHOR = "a" * 64


# What is pulled has one of four types; the tests say which.
load_pretrained: Callable[..., Any] = tangent_ops.load_pretrained
pull_from_hub: Callable[..., Any] = tangent_ops.pull_from_hub


def delta(seed: int = 0, shard: str | None = None) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    meta = DeltaMeta(ANCHOR, "a model", "head", loss="MSELoss()", shard=shard)
    return Delta({"head.weight": torch.randn(3, 4, generator=generator)}, meta)


def ledger_in(folder: Path) -> Ledger:
    ledger = Ledger(folder)
    for seed, name in enumerate(("anna", "bert")):
        ledger.add(name, delta(seed))
    return ledger


@pytest.fixture(scope="module")
def statistic():
    torch.manual_seed(0)
    model = linearize(torch.nn.Linear(4, 3), check=False)
    data = TensorDataset(torch.randn(6, 4), torch.arange(6) % 3)
    return statistics(model, data, progress=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Repositories]:
    with serving() as (address, held):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield held


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_folder_gives_back_a_delta_and_its_origin(tmp_path: Path) -> None:
    found = load_pretrained(save_pretrained(delta(), tmp_path / "saved"), anchor=ANCHOR)
    assert isinstance(found, Delta) and found.meta == delta().meta and equal(found, delta())
    assert load_delta(tmp_path / "saved" / "delta.safetensors").meta == delta().meta
    card = (tmp_path / "saved" / "README.md").read_text()
    assert ANCHOR in card and "MSELoss()" in card and "license:" not in card
    with pytest.raises(ArgumentError, match="not an empty folder"):
        save_pretrained(delta(), tmp_path / "saved")
    with pytest.raises(DeltaError, match="anchor"):
        load_pretrained(tmp_path / "saved", anchor="b" * 64)


def test_a_folder_gives_back_statistics_and_ledgers(tmp_path: Path, statistic) -> None:
    found = load_pretrained(save_pretrained(statistic, tmp_path / "statistics"))
    assert found.meta == statistic.meta and len(found) == 6
    assert equal(found.terms, statistic.terms)
    ledger = StatisticsLedger(tmp_path / "ledger")
    ledger.add("anna", statistic)
    found = load_pretrained(save_pretrained(ledger, tmp_path / "of ledger"))
    assert isinstance(found, StatisticsLedger)
    assert equal(found.statistics().terms, statistic.terms)
    found.forget("anna")  # the copy is a ledger of its own
    assert "anna" in ledger and "anna" not in found


@pytest.mark.parametrize("by_path", [False, True])
def test_a_delta_is_pushed_and_pulled(hub, tmp_path: Path, by_path: bool) -> None:
    item = delta()
    if by_path:
        item = tmp_path / "one.safetensors"
        save_delta(delta(), item)
    url = push_to_hub(item, "someone/delta", token="hf_x", commit_message="First")
    assert "/someone/delta/commit/" in url
    assert hub.private["someone/delta"] and "Bearer hf_x" in hub.tokens
    (first, pushed) = hub.commits["someone/delta"]
    assert first == {} and set(pushed) == {"README.md", "delta.safetensors", "tangent_ops.json"}
    found = pull_from_hub("someone/delta", anchor=ANCHOR)
    assert equal(found, delta()) and found.meta == delta().meta

    push_to_hub(delta(1), "someone/delta")
    assert equal(pull_from_hub("someone/delta"), delta(1))
    sha = hub.at("someone/delta", "main")[0]
    hub.commits["someone/delta"].append(pushed)
    assert equal(pull_from_hub("someone/delta", revision=sha), delta(1))


def test_other_files_of_a_repository_stay(hub, statistic) -> None:
    push_to_hub(delta(), "someone/mine")
    hub.commits["someone/mine"][-1] |= {"README.md": b"my own", "model.safetensors": b"weights"}
    push_to_hub(statistic, "someone/mine")
    now = hub.commits["someone/mine"][-1]
    assert now["README.md"] == b"my own" and now["model.safetensors"] == b"weights"
    assert "statistics.safetensors" in now and "delta.safetensors" not in now
    assert equal(pull_from_hub("someone/mine").terms, statistic.terms)


def test_a_ledger_is_pushed_and_pulled(hub, tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path / "ledger")
    push_to_hub(ledger, "someone/ledger")
    with pytest.raises(ArgumentError, match="give the folder where it shall live"):
        pull_from_hub("someone/ledger")
    found = pull_from_hub("someone/ledger", folder=tmp_path / "pulled")
    assert equal(found.composed(), ledger.composed())
    assert [entry.shard for entry in found.list()] == ["anna", "bert"]
    found.forget("anna")
    assert equal(found.composed(), delta(1))


def test_what_a_ledger_has_forgotten_stays_in_no_history(hub, tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path / "ledger")
    push_to_hub(ledger, "someone/ledger")
    ledger.forget("anna")
    with pytest.raises(LedgerError, match=r"history would keep it: delete the repository"):
        push_to_hub(ledger, "someone/ledger")
    assert len(hub.commits["someone/ledger"]) == 2  # nothing was pushed
    push_to_hub(ledger, "someone/new")
    push_to_hub(ledger, "someone/new")  # nothing was forgotten in between
    push_to_hub(ledger, "someone/ledger", keep_forgotten=True)
    names = set(hub.commits["someone/ledger"][-1])
    assert sum(name.startswith("ledger/deltas/") for name in names) == 1
    staged = (tmp_path / "staged").absolute()
    save_pretrained(ledger, staged)
    content = b"".join(path.read_bytes() for path in staged.rglob("*") if path.is_file())
    assert delta(0)["head.weight"].numpy().tobytes() not in content
    assert delta(1)["head.weight"].numpy().tobytes() in content


def test_a_database_that_was_changed_is_refused(tmp_path: Path) -> None:
    saved = save_pretrained(ledger_in(tmp_path / "ledger"), tmp_path / "saved")
    with sqlite3.connect(saved / "ledger" / "ledger.sqlite") as database:
        database.execute("UPDATE history SET shard = 'nobody'")
    database.close()
    with pytest.raises(DeltaFileError, match=r"ledger\.sqlite was changed"):
        load_pretrained(saved)


def test_what_was_changed_on_the_way_is_refused(hub, tmp_path: Path) -> None:
    push_to_hub(delta(), "someone/delta")
    pushed = dict(hub.commits["someone/delta"][-1])
    bad = bytearray(pushed["delta.safetensors"])
    bad[-1] ^= 1
    hub.commits["someone/delta"].append(pushed | {"delta.safetensors": bytes(bad)})
    with pytest.raises(DeltaFileError, match=r"was changed .* tangent_ops\.json says"):
        pull_from_hub("someone/delta")

    index = json.loads(pushed["tangent_ops.json"])
    for change, message in (
        ({"files": {"../../evil.py": "0"}}, r"names '\.\./\.\./evil\.py'"),
        ({"files": {"ledger/../x.safetensors": "0"}}, "it names"),
        ({"kind": "pickle"}, "a field has a wrong type"),
        ({"version": 9}, "format version 9.*update tangent-ops"),
        ({"extra": 1}, "is not an index of tangent-ops"),
    ):
        changed = json.dumps(index | change).encode()
        hub.commits["someone/delta"].append(pushed | {"tangent_ops.json": changed})
        with pytest.raises(DeltaFileError, match=message):
            pull_from_hub("someone/delta", folder=tmp_path / "never")
    assert not (tmp_path / "never").exists()
    hub.commits["someone/delta"].append({"model.safetensors": b"weights"})
    with pytest.raises(DeltaFileError, match="nothing was pushed there with push_to_hub"):
        pull_from_hub("someone/delta")


@pytest.mark.parametrize("item", [3, None, {"head.weight": torch.zeros(2)}])
def test_what_cannot_be_pushed_is_refused_before_the_server_is_asked(item) -> None:
    with pytest.raises(ArgumentError, match="item must be a Delta, Tan"):
        push_to_hub(item, "someone/else")
