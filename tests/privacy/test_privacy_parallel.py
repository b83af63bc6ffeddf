"""The privacy of a ledger is that of its weakest shard; read from real files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian_oracle import gaussian_epsilon
from refusals import refused
from statements import a_statement

from tangent_ops import Delta, DeltaMeta, Ledger
from tangent_ops.errors import ArgumentError, CertificateError, LedgerError, UnsupportedError
from tangent_ops.privacy.accounting import Phase
from tangent_ops.privacy.parallel_composition import ledger_privacy, parallel
from tangent_ops.privacy.statement import PrivacyStatement, attach

META = DeltaMeta("a" * 64, "tiny", "head")


def make(sigma: float, **changes: Any) -> PrivacyStatement:
    return a_statement(Phase(sigma, 1.0, 1), **changes)


def a_delta(value: float, statement: PrivacyStatement | None) -> Delta:
    delta = Delta({"w": torch.tensor([float(value)])}, META)
    return delta if statement is None else attach(delta, statement)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger")
    for shard, sigma in (("calm", 8), ("loud", 1), ("mild", 3)):
        ledger.add(shard, a_delta(sigma, make(sigma)))
    return ledger


LOUD = rb"\"noise_multiplier\": 1.0"  # of its statement, in a file's header
EPSILONS = {sigma: gaussian_epsilon(1 / sigma, 1e-5) for sigma in (1, 3)}


def test_the_largest_counts_and_not_the_sum(ledger: Ledger) -> None:
    found = ledger_privacy(ledger)
    assert found.delta == 1e-5
    assert found.epsilon == pytest.approx(EPSILONS[1], rel=1e-3)
    assert found.epsilon_at(1e-5) == found.epsilon < found.epsilon_at(1e-6)
    assert (found.missing, found.forgotten, found.again) == ((), (), ())
    text = str(found)
    assert text.startswith("(4.37") and "shard 'loud' has the largest" in text
    # Even odds: half of 1 + (2 Phi(1/2) - 1) = Phi(1/2) = 0.6915
    assert "right at most 69.2% of the time" in text
    assert "no sample is in two" in text and "the anchor is public" in text


def test_after_forget_the_present_shards_count(ledger: Ledger) -> None:
    assert any(LOUD in one.read_bytes() for one in files(ledger))
    ledger.forget("loud")
    found = ledger_privacy(ledger)
    assert found.epsilon == pytest.approx(EPSILONS[3], rel=1e-3)
    assert found.forgotten == ("loud",) and found.again == ()
    assert "'loud': not counted. What was published while they were there costs" in str(found)
    assert not any(LOUD in one.read_bytes() for one in files(ledger))


def test_an_id_that_came_again_is_named(ledger: Ledger) -> None:
    ledger.forget("loud")
    ledger.add("loud", a_delta(1, make(8)))
    found = ledger_privacy(ledger)
    assert (found.forgotten, found.again) == ((), ("loud",))
    assert found.epsilon == pytest.approx(EPSILONS[3], rel=1e-3)
    assert "'loud': added more than once" in str(found) and "earlier.then(later)" in str(found)


@pytest.mark.parametrize("delta", [a_delta(2, None), {"w": torch.tensor([2.0])}])
def test_a_shard_without_a_statement_promises_nothing(delta, ledger: Ledger) -> None:
    ledger.add("bare", delta)
    found = ledger_privacy(ledger)
    assert found.missing == ("bare",)
    assert found.epsilon == found.epsilon_at(0.5) == math.inf
    first, second, *_ = str(found).splitlines()
    assert first == "No privacy is promised: 1 of 4 shards have no statement."
    assert "'bare'" in second
    ledger.forget("bare")
    assert ledger_privacy(ledger).epsilon == pytest.approx(EPSILONS[1], rel=1e-3)


def test_an_edited_statement_is_refused(ledger: Ledger) -> None:
    low = replace(make(1), epsilon=0.5)
    ledger.add("edited", a_delta(2, low))
    refused(CertificateError, r"shard 'edited': .* claims epsilon = 0\.5", ledger_privacy, ledger)
    ledger.forget("edited")
    meta = replace(META, extra={"privacy": "{}"})
    ledger.add("edited", Delta({"w": torch.tensor([2.0])}, meta))
    refused(ArgumentError, "shard 'edited': text is no privacy statement", ledger_privacy, ledger)


def test_an_edited_file_is_refused(ledger: Ledger) -> None:
    for path in files(ledger):
        content = path.read_bytes()
        path.write_bytes(content.replace(LOUD, LOUD.replace(b"1", b"9")))
    with pytest.raises(LedgerError, match=r"was changed after it was written.*forget\('loud'"):
        ledger_privacy(ledger)


def test_an_empty_ledger_promises_nothing(tmp_path: Path) -> None:
    refused(LedgerError, "is empty", ledger_privacy, Ledger(tmp_path / "empty"))


def test_json(ledger: Ledger) -> None:
    ledger.forget("mild")
    record = json.loads(ledger_privacy(ledger).to_json())
    assert record["epsilon"] == pytest.approx(EPSILONS[1], rel=1e-3)
    assert (record["delta"], record["missing"]) == (1e-5, [])
    assert (record["forgotten"], record["again"]) == (["mild"], [])
    assert list(record["shards"]) == ["calm", "loud"]
    loud = PrivacyStatement.from_json(json.dumps(record["shards"]["loud"]))
    assert loud == make(1)
    record = json.loads(parallel({"a": make(1), "b": None}).to_json())
    assert (record["epsilon"], record["missing"], record["shards"]["b"]) == ("inf", ["b"], None)


def test_statements_at_several_deltas() -> None:
    found = parallel({"a": make(1, delta=1e-4), "b": make(1.1, delta=1e-6)})
    assert found.delta == 1e-6  # at which each promises at least what it says
    assert found.epsilon == make(1).epsilon_at(1e-6)
    assert found.epsilon_at(1e-4) == make(1, delta=1e-4).epsilon


def test_at_each_delta_the_largest_there() -> None:
    # Curves that cross: a Gaussian, and a rare sample under little noise.
    gaussian = make(8)
    rare = a_statement(Phase(0.5, 1e-3, 1))
    found = parallel({"gaussian": gaussian, "rare": rare})
    high, low = 1e-3, 1e-9
    assert gaussian.epsilon_at(high) > rare.epsilon_at(high)
    assert gaussian.epsilon_at(low) < rare.epsilon_at(low)
    assert found.epsilon_at(high) == gaussian.epsilon_at(high)
    assert found.epsilon_at(low) == rare.epsilon_at(low)
    assert "'gaussian' has the largest" in found.describe(high)
    assert "'rare' has the largest" in found.describe(low)


def test_bad_input_is_refused() -> None:
    replaced = make(1, adjacency="replace one sample")
    with pytest.raises(ArgumentError, match="different adjacency"):
        parallel({"a": make(1), "b": None, "c": replaced})
    refused(UnsupportedError, "may change its shard", parallel, {"a": replaced, "b": replaced})
    for wrong in ({}, [make(1)], None):
        refused(ArgumentError, "statements must map shards to statements", parallel, wrong)
    with pytest.raises(ArgumentError, match=r"statements\['a'\] must be a statement .* a float"):
        parallel({"a": 1.0})


def files(ledger: Ledger) -> list[Path]:
    return sorted((ledger.path / "deltas").iterdir())
