"""`tangent-ops audit`, as it is typed."""

from __future__ import annotations

import importlib.util
import json

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("opacus", reason="the extra for privacy is not installed")
pytest.importorskip("dp_accounting", reason="the extra for privacy is not installed")

from tangent_ops.cli.app import app
from tangent_ops.privacy.per_sample import gradients


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["audit", *map(str, words)])


QUICK = ("--runs", 60, "--sample-rate", 1, "--steps", 1, "--seed", 3)


def test_a_claim_that_stands() -> None:
    result = run(*QUICK, "--noise-multiplier", 2, "--mode", "ghost")
    assert result.exit_code == 0, result.output
    # Of a Gaussian mechanism with μ = 1/2: 1.9931 by Balle, Wang (2018), theorem 8.
    for words in (
        "8 samples and a canary, seed 3",
        "ε = 1.993",
        "The claim stands",
        "over 60 train",
    ):
        assert words in result.stdout


def test_a_refuted_claim_exits_with_1_as_json(monkeypatch) -> None:
    monkeypatch.setattr(gradients, "clip_factors", lambda norms, _: 0 * norms + 1)
    result = run(*QUICK, "--json", "--delta", 1e-6, "--confidence", 0.9)
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert (found["consistent"], found["tpr"], found["fpr"], found["runs"]) == (False, 1, 0, 60)
    assert (found["delta"], found["confidence"]) == (1e-6, 0.9)
    assert found["family_lower_bound"] > found["claimed"]


REFUSED = {
    "--noise-multiplier 0": "expected above 0",
    "--noise-multiplier nan": "expected above 0",
    "--sample-rate 1.5": "expected 0.001 to 1",
    "--sample-rate 0.0001": "expected 0.001 to 1",
    "--steps 0": "expected 1 or more",
    "--max-grad-norm -1": "expected above 0",
    "--delta 0.2": "expected 1e-12 up to 0.111, one over the number of samples",
    "--delta 0": "expected 1e-12 up to",
    "--runs 10": "expected 40 or more",
    "--runs 51": "expected an even number",
    "--confidence 95": "expected between 0 and 1",
    "--mode fast": "expected bookkeeping, ghost, per-sample",
    "--seed -1": "expected 0 or more",
}


@pytest.mark.parametrize(("words", "message"), REFUSED.items(), ids=REFUSED)
def test_bad_options_are_refused(words: str, message: str) -> None:
    result = run(*words.split())
    assert result.exit_code == 2, result.output
    option, _ = words.split()
    assert result.stderr.startswith(f"error: {option} ") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_extra(monkeypatch) -> None:
    own = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "opacus" else own(name)
    )
    result = run(*QUICK)
    assert result.exit_code == 2
    assert 'this needs opacus: pip install "tangent-ops[privacy]"' in result.stderr
