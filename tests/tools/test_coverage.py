"""The coverage sweep: it sees what is right, wrong and impossible, and its page is up to date."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from torch import nn

from benchmarks.stored import BadFile
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
    """Computes from its weight once, and never again."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = 2 * self.weight
        return self.kept * x


def test_a_forgotten_tangent_is_wrong():
    row = row_of(nn.Sequential(nn.Linear(4, 4), Keeps()))
    assert row.verdict == WRONG
    assert row.errors[0].primal < 1e-6 < 1e-2 < row.errors[0].tangent
    assert len(row.errors) == 1  # no further input is tried


def test_a_right_model_and_what_it_is_made_of():
    member = Member(
        TIMM,
        "beit",
        "beit_base_patch16_224",
        {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5},
        32,
    )
    row = measure(member)
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


class NoJvp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class WrongJvp(NoJvp):
    @staticmethod
    def jvp(ctx, x_t):
        return 3 * x_t


class Applies(nn.Linear):
    def __init__(self, call):
        super().__init__(4, 4)
        self.call = call

    def forward(self, x):
        return self.call(super().forward(x))


def test_what_is_impossible_has_a_reason():
    row = row_of(Applies(NoJvp.apply))
    assert (row.verdict, row.errors) == (REFUSED, [])
    assert "NoJvp" in row.reason
    row = row_of(Applies(lambda x: x.detach().numpy() and x))
    assert row.verdict == FAILED
    assert row.reason


def test_no_answer_where_pytorch_disagrees_with_itself():
    class WithoutFunctorch(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y + (y - y.detach()) if y.requires_grad else y  # reverse mode alone

    row = row_of(WithoutFunctorch(4, 4))
    assert row.verdict == UNKNOWN
    assert "disagree" in row.reason


def test_float32_is_to_blame_only_where_it_is():
    small, large, exact = Errors(1e-7, 1e-7, 1e-7), Errors(1e-7, 1e-3, 1e-7), Errors(0, 1e-14, 0)
    assert judge(large, large, exact) == ROUNDED
    assert judge(large, small, exact) == WRONG
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
    member = Member(TIMM, family, model)
    error = [Errors(1e-7, 2e-7, 3e-7)]
    return Row(dataclasses.asdict(member), verdict, errors=error, pytorch=error)


def test_resuming_measures_what_is_missing(tmp_path, monkeypatch):
    asked = []
    chosen = [Member(TIMM, "vit", name) for name in ("a", "b")]
    monkeypatch.setattr(command, "members", lambda only: chosen)
    monkeypatch.setattr(sweep, "in_a_process", lambda m: asked.append(m.model) or a_row(m.model))
    write_rows(tmp_path / "rows.jsonl", [a_row("a"), a_row("other")])
    monkeypatch.setattr(sys, "argv", ["coverage", "--out", str(tmp_path), "--resume"])
    assert command.main() == 0
    assert asked == ["b"]
    assert list(read_rows(tmp_path / "rows.jsonl")) == ["timm a", "timm other", "timm b"]
    monkeypatch.setattr(sys, "argv", ["coverage", "--out", str(tmp_path)])
    assert command.main() == 0
    assert asked == ["b", "a", "b"]


@pytest.mark.parametrize("text", ["no json", "[]", '{"member": {}}'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(BadFile, match=r"rows\.jsonl is not a result of the coverage sweep"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_family_is_right_where_all_its_members_are():
    rows = [a_row("a"), a_row("b", WRONG), a_row("c", family="swin")]
    assert "**1 of 2 families of timm right (50 %" in page.counts(rows)
    assert "silently wrong: 1.**" in page.counts(rows)


def test_members_of_a_family():
    found = list(members("^timm deit "))
    assert [m.model for m in found] == [
        "deit_tiny_patch16_224",
        "deit3_small_patch16_224",
        "deit_tiny_distilled_patch16_224",
    ]
    assert list(members("no such")) == []


def test_the_page_is_that_of_the_stored_rows():
    rows = read_rows(page.STORED).values()
    assert page.PAGE.read_text(encoding="utf-8") == page.page_of(rows), (
        "`python -m tools.coverage --write` writes it"
    )
    assert not any(row.verdict == WRONG for row in rows)
    assert len({row.member["family"] for row in rows if row.member["source"] == TIMM}) > 90
