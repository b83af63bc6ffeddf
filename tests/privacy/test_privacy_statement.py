"""Privacy statements: claims, composition, JSON, files, text and refusals."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from statements import a_statement

from tangent_ops import Delta, DeltaMeta, compose, load_delta, save_delta
from tangent_ops.errors import ArgumentError, CertificateError
from tangent_ops.privacy.accounting import Phase
from tangent_ops.privacy.statement import PrivacyStatement, attach, plain, statement_of

META = DeltaMeta("a" * 64, "tiny", "head", loss="square", extra={"note": "kept"})


def make(*phases: Phase, **changes: Any) -> PrivacyStatement:
    given = {"mechanism": "DP-SGD: Poisson-subsampled Gaussian", "clip": 1.5, "sampling": "Poisson"}
    return a_statement(*phases or (Phase(4, 0.01, 10_000),), **{**given, **changes})


@pytest.fixture(scope="module")
def statement() -> PrivacyStatement:
    return make()


def test_what_is_claimed(statement: PrivacyStatement) -> None:
    assert statement.epsilon == pytest.approx(0.947, abs=1e-3)
    assert statement.epsilon_prv == pytest.approx(0.957, abs=1e-3)
    deltas, epsilons = zip(*statement.curve, strict=True)
    assert deltas == (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
    assert list(epsilons) == sorted(epsilons) and statement.epsilon in epsilons
    assert statement.epsilon_at(1e-5) == statement.epsilon
    assert statement.failure_at(statement.epsilon) == pytest.approx(1e-5, rel=1e-3)
    assert "dp-accounting 0.6" in statement.accountant and "opacus 1.6" in statement.accountant
    assert (2e-5 in dict(make(delta=2e-5).curve)) and len(make(delta=2e-5).curve) == 8
    statement.verify()


def test_then_composes_one_after_the_other() -> None:
    first = make(Phase(3, 1.0, 1), clip=2.0, assumes=("a", "b"))
    second = make(Phase(4, 1.0, 1), clip=1.0, delta=1e-6, noise="coins", assumes=("b", "c"))
    both = first.then(second)
    # GDP: 1/3² + 1/4² = 1/2.4²
    assert both.epsilon == pytest.approx(make(Phase(2.4, 1.0, 1)).epsilon, rel=1e-9)
    assert both.phases == (Phase(3, 1.0, 1), Phase(4, 1.0, 1))
    assert (both.clip, both.delta, both.assumes) == (2.0, 1e-5, ("a", "b", "c"))
    assert (both.noise, both.mechanism) == ("dice; then coins", first.mechanism)
    assert second.then(first).clip == 2.0
    assert both.epsilon > max(first.epsilon, second.epsilon_at(1e-5))


def test_json_gives_the_statement_back(statement: PrivacyStatement) -> None:
    assert PrivacyStatement.from_json(statement.to_json()) == statement
    bare = make(Phase(0, 0.01, 1))
    assert bare.epsilon == math.inf
    assert json.loads(bare.to_json())["epsilon"] == "inf"
    assert PrivacyStatement.from_json(bare.to_json()) == bare


@pytest.mark.parametrize(
    ("message", "change"),
    {
        "Expecting value": lambda record: "no JSON",
        "format": lambda record: {**record, "format": "tangent-ops privacy statement 2"},
        "NoneType": lambda record: None,
        "format is": lambda record: {},
        "unknown budget": lambda record: {**record, "budget": 1},
        "noise": lambda record: {key: record[key] for key in record if key != "noise"},
        "steps must": lambda record: {
            **record,
            "phases": [{"noise_multiplier": 1, "sample_rate": 1, "steps": -1}],
        },
        "epsilon must .* -1": lambda record: {**record, "epsilon": -1},
        "epsilon must .* '0.9'": lambda record: {**record, "epsilon": "0.9"},
        "epsilon must .* nan": lambda record: {**record, "epsilon": math.nan},
        "epsilon_prv must .* None": lambda record: {**record, "epsilon_prv": None},
        "curve's epsilon at 0.1": lambda record: {**record, "curve": [[0.1, None]]},
        "unpack": lambda record: {**record, "curve": [[0.1]]},
        "delta must": lambda record: {**record, "delta": 0},
        "clip must": lambda record: {**record, "clip": 0},
        "phases must": lambda record: {**record, "phases": []},
        "mechanism must be in words": lambda record: {**record, "mechanism": 3},
        r"assumes\[0\] must be in words": lambda record: {**record, "assumes": [1]},
        "assumes must be": lambda record: {**record, "assumes": "abc"},
        "for 'add or remove": lambda record: {**record, "adjacency": "replace one"},
    }.items(),
)
def test_other_json_is_refused(message: str, change, statement: PrivacyStatement) -> None:
    changed = change(json.loads(statement.to_json()))
    text = changed if isinstance(changed, str) else json.dumps(changed)
    with pytest.raises(ArgumentError, match=f"text is no privacy statement's JSON: .*{message}"):
        PrivacyStatement.from_json(text)


def test_verify_refuses_a_lower_claim(statement: PrivacyStatement) -> None:
    lower = statement.epsilon * 0.998
    with pytest.raises(CertificateError, match=r"claims epsilon = 0\.945.* give is 0\.946"):
        replace(statement, epsilon=lower).verify()
    with pytest.raises(CertificateError, match=r"claims epsilon_prv = 0\.9"):
        replace(statement, epsilon_prv=0.9).verify()
    curve = ((1e-9, 1.0), *statement.curve)
    with pytest.raises(CertificateError, match="claims curve: epsilon = 1 at delta 1e-09"):
        replace(statement, curve=curve).verify()
    with pytest.raises(CertificateError, match="claims epsilon"):
        replace(statement, phases=(Phase(2, 0.01, 10_000),)).verify()
    with pytest.raises(CertificateError, match="give is inf"):
        replace(statement, phases=(Phase(0, 0.01, 10_000),)).verify()
    replace(statement, epsilon=2.0, phases=(Phase(4, 0.01, 9000),)).verify()  # claims more


def test_a_file_keeps_the_statement(statement: PrivacyStatement, tmp_path: Path) -> None:
    delta = Delta({"w": torch.ones(2)}, META)
    assert statement_of(delta) is None and statement_of({"w": torch.ones(2)}) is None
    private = attach(delta, statement)
    assert delta.meta == META
    save_delta(private, tmp_path / "delta")
    loaded = load_delta(tmp_path / "delta")
    assert statement_of(loaded) == statement
    assert loaded.meta is not None and loaded.meta.extra["note"] == "kept"
    assert statement_of(loaded.meta) == statement
    assert statement_of(attach(loaded, make(Phase(9, 1.0, 1)))) == make(Phase(9, 1.0, 1))


def test_a_statement_is_of_the_values_that_it_was_attached_to(statement: PrivacyStatement) -> None:
    private = attach(Delta({"w": torch.ones(2)}, META), statement)
    with pytest.raises(CertificateError, match="another delta"):
        statement_of(Delta({"w": torch.zeros(2)}, private.meta))
    halved = Delta({"w": private["w"] / 2}, private.meta)  # as private, if its owner says so
    assert statement_of(attach(halved, statement)) == statement
    private["w"].add_(1)
    refused(CertificateError, "attach it anew", statement_of, private)


def test_a_sum_of_deltas_has_no_statement(statement: PrivacyStatement) -> None:
    delta = attach(Delta({"w": torch.ones(2)}, META), statement)
    assert statement_of(compose([delta, delta])) is None


def test_what_people_read(statement: PrivacyStatement) -> None:
    text = str(statement)
    first, *_ = text.splitlines()
    assert first == "(0.947, 1e-05)-differential privacy for each sample"
    # Of even odds: half of 1 + the hockey-stick divergence at 0, 0.1007 (Gaussian limit: mu 0.254)
    assert "right at most 55.1% of the time" in text
    for word in (
        "DP-SGD: Poisson-subsampled Gaussian",
        "add or remove one sample",
        "T = 10,000, sigma = 4 (noise / sensitivity), q = 0.01",
        "C = 1.5",
        "0.947 (PLD), 0.957 (PRV) at delta = 1e-05",
        "dice",
        "the anchor is public",
        "dp-accounting",
    ):
        assert word in text
    assert "1e-06-diff" not in text and "(1.085, 1e-06)" in statement.describe(1e-6)
    assert str(make(Phase(0, 1.0, 1))).startswith("No privacy is promised at delta = 1e-05")


def test_numbers_for_people_are_rounded_up() -> None:
    assert [plain(value) for value in (0.94691, 12.341, 0.0, math.inf, 2.0, 1e-5, 14202.04)] == [
        "0.947", "12.35", "0", "inf", "2", "1e-05", "1.421e+04",
    ]  # fmt: skip


def test_every_field_has_its_line_in_the_docs() -> None:
    assert PrivacyStatement.__doc__ is not None
    for field in fields(PrivacyStatement):
        assert f"        {field.name}: " in PrivacyStatement.__doc__


def test_bad_input_is_refused(statement: PrivacyStatement) -> None:
    gaussian = make(Phase(1, 1.0, 1), adjacency="replace one sample")
    refused(ArgumentError, "of different adjacency do not compose", statement.then, gaussian)
    with pytest.raises(ArgumentError, match="accounted for 'add or remove one sample' only"):
        make(adjacency="replace one sample")
    refused(ArgumentError, "other must be a PrivacyStatement, got a str", statement.then, "other")
    refused(ArgumentError, "clip must be a positive number, got 0", make, clip=0.0)
    refused(ArgumentError, "assumes must be several strings, got one, 'luck'", make, assumes="luck")
    refused(ArgumentError, "got one Phase: use a list", make, phases=Phase(1, 1.0, 1))
    refused(ArgumentError, "noise must be in words, got ''", make, noise="")
    with pytest.raises(ArgumentError, match="without meta holds no statement"):
        attach(Delta({"w": torch.ones(2)}), statement)
    with pytest.raises(ArgumentError, match="statement must be a PrivacyStatement, got a str"):
        attach(Delta({"w": torch.ones(2)}, META), statement.to_json())
    with pytest.raises(ArgumentError, match="no privacy statement's JSON"):
        statement_of(replace(META, extra={"privacy": "yes"}))
