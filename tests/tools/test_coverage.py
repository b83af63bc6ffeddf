"""The coverage sweep tells right, rounded and wrong apart, and its page is up to date."""

from __future__ import annotations

import json

import pytest
import torch
from small_models import NoJvp
from torch import nn

from tools.coverage import __main__ as command
from tools.coverage import page, sweep
from tools.coverage.answers import Errors
from tools.coverage.measure import (
    FAILED,
    REFUSED,
    RIGHT,
    ROUNDED,
    UNKNOWN,
    WRONG,
    Row,
    judge,
    measure,
)
from tools.coverage.members import TIMM, TORCH, Member, members
from tools.coverage.sweep import in_a_process, read_rows, write_rows

MEMBER = Member(TORCH, "small", "one")
ENCODER = Member(TORCH, "nn.TransformerEncoder", "norm last", {"norm_first": False})


def row_of(model: nn.Module) -> Row:
    return measure(MEMBER, (model, lambda source: torch.randn(2, 4, generator=source)))


class Keeps(nn.Module):
    """Computes from its weight in its first call alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = 2 * self.weight
        return self.kept * x


def test_a_lost_tangent_is_wrong():
    row = row_of(nn.Sequential(nn.Linear(4, 4), Keeps()))
    assert row.verdict == WRONG
    assert row.errors[0].primal < 1e-6 < 1e-2 < row.errors[0].tangent
    assert len(row.errors) == 1  # no further input is tried


def test_a_right_model_and_what_it_is_made_of():
    options = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    row = measure(Member(TIMM, "beit", "beit_base_patch16_224", options, 32))
    assert row.verdict == RIGHT
    assert row.size == [2, 3, 32, 32]
    assert 0 < row.errors[0].largest < 1e-5
    assert row.attention == "sdpa, trained bias"
    assert (row.fused["attention"], row.fused["conv2d"]) == (2, 1)
    assert {"class token", "packed qkv", "relative positions", "layer scale"} <= set(row.parts)
    assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row


@pytest.mark.parametrize("name", ["softmax by hand", "products by hand", "none"])
def test_attention_by_hand_is_seen(name):
    class Mixes(nn.Linear):
        def forward(self, x):
            q = super().forward(x.view(2, 2, 2))
            if name == "none":
                return q
            scores = q @ q.transpose(1, 2)
            return (scores.softmax(-1) if name == "softmax by hand" else scores) @ q

    assert row_of(Mixes(2, 2)).attention == name


class Applies(nn.Linear):
    def __init__(self, call):
        super().__init__(4, 4)
        self.call = call

    def forward(self, x):
        return self.call(super().forward(x))


@pytest.mark.parametrize(
    ("call", "verdict", "reason"),
    [
        (NoJvp.apply, REFUSED, "NoJvp"),
        (lambda y: y.detach().numpy() and y, FAILED, ""),
        # What reverse mode alone sees: forward mode disagrees.
        (lambda y: y + (y - y.detach()) if y.requires_grad else y, UNKNOWN, "disagree"),
    ],
)
def test_what_has_no_answer_has_a_reason(call, verdict, reason):
    row = row_of(Applies(call))
    assert (row.verdict, row.errors) == (verdict, [])
    assert row.reason and reason in row.reason


def test_float32_excuses_only_what_it_explains():
    small, large, exact = Errors(1e-7, 1e-7, 1e-7), Errors(1e-7, 1e-3, 1e-7), Errors(0, 1e-14, 0)
    assert judge(large, large, exact) == ROUNDED
    assert judge(large, small, exact) == WRONG
    rounded = Errors(0, 5e-8, 0)  # in float64, where PyTorch itself rounds to float32
    assert judge(large, large, rounded, 1e-7) == ROUNDED
    assert judge(large, large, rounded) == WRONG
    assert judge(large, large, large) == WRONG
    assert judge(Errors(1e-7, 1e-7, 1e-3), large, exact) == WRONG
    assert judge(Errors(1e-7, float("nan"), 1e-7), large, exact) == WRONG


def test_in_a_process_and_over_its_limit():
    assert in_a_process(ENCODER).verdict == RIGHT
    late = in_a_process(ENCODER, seconds=0)
    assert (late.verdict, late.reason) == (FAILED, "takes more than 0 s")
    unknown = in_a_process(Member(TIMM, "none", "no_such_model"))
    assert unknown.verdict == FAILED
    assert "no_such_model" in unknown.reason


def a_row(model: str, verdict: str = RIGHT, family: str = "vit") -> Row:
    error = [Errors(1e-7, 2e-7, 3e-7)]
    member = Member(TIMM, family, model).to_json()
    return Row(member, verdict, errors=error, pytorch=error)


def test_resuming_measures_what_is_missing(tmp_path, monkeypatch):
    measured = []
    chosen = [Member(TIMM, "vit", name) for name in ("a", "b")]
    monkeypatch.setattr(command, "members", lambda only: chosen)
    monkeypatch.setattr(sweep, "in_a_process", lambda m: measured.append(m.model) or a_row(m.model))
    path = tmp_path / "rows.jsonl"
    write_rows(path, [a_row("a"), a_row("other")])
    assert command.main(["--rows", str(path), "--resume"]) == 0
    assert measured == ["b"]
    assert list(read_rows(path)) == ["timm a", "timm other", "timm b"]
    assert command.main(["--rows", str(path)]) == 0
    assert measured == ["b", "a", "b"]


@pytest.mark.parametrize("text", ["no json", "[]", '{"member": {}}'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"rows\.jsonl is not a result of the coverage sweep"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_family_is_right_where_all_its_members_are():
    counts = page.counts([a_row("a"), a_row("b", WRONG), a_row("c", family="swin")])
    assert "**1 of 2 families of timm right (50 %" in counts
    assert "wrong without an error: 1.**" in counts


def test_members_of_a_family():
    mixers = ["gmlp_ti16_224", "mixer_s32_224", "resmlp_12_224"]
    assert [m.model for m in members("^timm mlp_mixer ")] == mixers
    assert list(members("no such")) == []


def test_the_page_is_that_of_the_stored_rows():
    rows = read_rows(page.STORED).values()
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.page_of(rows), "`python -m tools.coverage --write` writes it"
    assert not any(row.verdict == WRONG for row in rows)
    assert len({row.member["family"] for row in rows if row.member["source"] == TIMM}) > 90


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_every_stored_verdict_still_holds():
    """The whole sweep: 25 minutes on 2 cores."""
    stored = read_rows(page.STORED)
    found = {member.key: in_a_process(member) for member in members()}
    changed = {
        key: (stored[key].verdict, row.verdict, row.reason)
        for key, row in found.items()
        if key in stored and row.verdict != stored[key].verdict
    }
    assert changed == {}
    assert len(found) > 100
