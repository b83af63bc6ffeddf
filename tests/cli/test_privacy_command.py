"""The command `tangent-ops privacy`."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import cli_runs
import pytest
import torch
from cli_runs import parsed, refused

pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")

from statements import a_statement

from tangent_ops import Delta, DeltaMeta, Ledger, save_delta
from tangent_ops.privacy.statement import PrivacyStatement, attach

PLAIN = Delta({"w": torch.tensor([1.0])}, DeltaMeta("a" * 64, "tiny", "head"))


run = partial(cli_runs.run, "privacy")


@pytest.fixture(scope="module")
def statement() -> PrivacyStatement:
    return a_statement(mechanism="Gaussian [sic]")


@pytest.fixture
def file(tmp_path: Path, statement: PrivacyStatement) -> Path:
    save_delta(attach(PLAIN, statement), tmp_path / "delta")
    return tmp_path / "delta"


def test_of_a_file(file: Path, statement: PrivacyStatement) -> None:
    result = run(file)
    assert (result.exit_code, result.stdout) == (0, f"{statement}\n")
    assert "Gaussian [sic]" in result.stdout
    result = run(file, "--delta", "1e-3")
    assert result.exit_code == 0
    assert result.stdout.startswith("(3.139, 0.001)-differential")  # 3.1387: Balle, Wang, 2018


def test_of_a_file_as_json(file: Path, statement: PrivacyStatement) -> None:
    record = parsed(run(file, "--json", "--delta", "1e-3"))
    assert record["delta"] == 1e-3 and record["epsilon"] == pytest.approx(3.1387, rel=1e-4)
    assert PrivacyStatement.from_json(json.dumps(record["statement"])) == statement
    assert parsed(run(file, "--json"))["epsilon"] == statement.epsilon


def test_of_a_ledger(file: Path, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.add("a", file)
    ledger.add("b", file)
    result = run(ledger.path)
    assert result.exit_code == 0
    assert result.stdout.startswith("(4.378, 1e-05)-diff") and "2 shards" in result.stdout
    record = parsed(run(ledger.path, "--json"))
    assert record["epsilon"] == pytest.approx(4.3772, rel=1e-4)
    assert list(record["ledger"]["shards"]) == ["a", "b"]

    ledger.add("bare", PLAIN)
    result = run(ledger.path)
    assert result.exit_code == 1 and "'bare'" in result.stdout
    assert parsed(run(ledger.path, "--json"))["epsilon"] == "inf"


def test_without_a_statement_it_exits_with_1(tmp_path: Path) -> None:
    save_delta(PLAIN, tmp_path / "plain")
    result = run(tmp_path / "plain", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "plain has no privacy statement: nothing is promised" in result.stderr


def test_a_statement_that_claims_too_little_exits_with_1(
    statement: PrivacyStatement, tmp_path: Path
) -> None:
    edited = attach(PLAIN, replace(statement, epsilon=0.1))
    save_delta(edited, tmp_path / "edited")
    Ledger(tmp_path / "ledger").add("a", edited)
    for path in (tmp_path / "edited", tmp_path / "ledger"):
        result = run(path)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "claims epsilon = 0.1 at delta 1e-05; what its phases give is 4.37" in result.stderr


def test_bad_input_exits_with_2(file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, message in (
        ((tmp_path / "missing",), "there is no such file or folder"),
        ((tmp_path / "empty",), "holds no ledger"),
        ((file, "--delta", "2"), "delta must be from 1e-12 to 1, got 2.0"),
    ):
        result = run(*words)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ") and message in result.stderr
    file.write_bytes(file.read_bytes()[:-1])
    assert run(file).exit_code == 2


def test_without_the_extra_it_says_how_to_get_it(file: Path, not_installed) -> None:
    not_installed("opacus")
    refused(run(file), 'needs opacus: pip install "tangent-ops[privacy]"')
