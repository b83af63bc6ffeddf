"""The command `tangent-ops audit`."""

from __future__ import annotations

from functools import partial

import cli_runs
import pytest
from cli_runs import complaint, parsed, refused

pytest.importorskip("opacus", reason="the extra for privacy is not installed")
pytest.importorskip("dp_accounting", reason="the extra for privacy is not installed")

from tangent_ops.privacy.per_sample import gradients

run = partial(cli_runs.run, "audit")
QUICK = ("--runs", 60, "--sample-rate", 1, "--steps", 1, "--seed", 3)


def test_a_claim_that_stands() -> None:
    result = run(*QUICK, "--noise-multiplier", 2, "--mode", "ghost")
    assert result.exit_code == 0, result.output
    # Of a Gaussian mechanism with μ = 1/2: 1.9931 by Balle, Wang (2018), theorem 8.
    said = ("8 samples and a canary, seed 3", "ε = 1.993", "The claim stands", "over 60 train")
    assert [words for words in said if words not in result.stdout] == []


def test_a_refuted_claim_exits_with_1_as_json(monkeypatch) -> None:
    monkeypatch.setattr(gradients, "clip_factors", lambda norms, _: 0 * norms + 1)
    result = run(*QUICK, "--json", "--delta", 1e-6, "--confidence", 0.9)
    assert result.exit_code == 1, result.output
    found = parsed(result)
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
    option, _ = words.split()
    found = complaint(run(*words.split()))
    assert found.startswith(f"{option} ") and message in found


def test_a_missing_extra(not_installed) -> None:
    not_installed("opacus")
    refused(run(*QUICK), 'this needs opacus: pip install "tangent-ops[privacy]"')
