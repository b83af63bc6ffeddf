"""One row of the sweep: what came of one model."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from tangent_ops.errors import UnsupportedError
from tools.coverage.answers import (
    Errors,
    Question,
    directions,
    disagreement,
    errors,
    ours,
    pytorchs,
    shake,
)
from tools.coverage.members import Built, Member
from tools.coverage.observe import Seen, parts, watched

TARGET = 1e-4
EXACT = 1e-9  # what float64 makes of an exact formula, and of two that agree
INPUT_SEEDS = (3, 4, 5, 6, 7)

RIGHT, ROUNDED, WRONG, REFUSED, FAILED, UNKNOWN = (
    "right",
    "float32",
    "wrong",
    "refused",
    "failed",
    "no answer",
)


@dataclass
class Row:
    """A model's line.

    Attributes:
        verdict: `right`: within TARGET of float64; `float32`: PyTorch's own float32 is as far
            from float64 as ours, and our float64 agrees with it; `wrong`: neither; `refused`: an
            UnsupportedError; `failed`: another error; `no answer`: PyTorch has none in float64.
        reason: in words, where there is no error to state.
        errors: of ours in float32, input after input until one is right.
        pytorch: of PyTorch's own in float32, likewise.
        float64: of ours in float64, where it was asked.
    """

    member: dict[str, Any]
    verdict: str = UNKNOWN
    reason: str = ""
    size: list[int] = field(default_factory=list)
    parameters: int = 0
    attention: str = ""
    parts: list[str] = field(default_factory=list)
    fused: dict[str, int] = field(default_factory=dict)
    errors: list[Errors] = field(default_factory=list)
    pytorch: list[Errors] = field(default_factory=list)
    float64: Errors | None = None
    seconds: float = 0.0
    about: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Row:
        row = cls(**content)
        row.errors = [Errors(**each) for each in content["errors"]]
        row.pytorch = [Errors(**each) for each in content["pytorch"]]
        row.float64 = Errors(**content["float64"]) if content["float64"] else None
        return row


def measure(member: Member, built: Built | None = None) -> Row:
    """The row of a model, built here unless given."""
    row, start = Row(dataclasses.asdict(member)), time.monotonic()
    torch.manual_seed(0)
    model, draw = built or member.build()
    shake(model)
    row.parameters, row.parts = sum(p.numel() for p in model.parameters()), parts(model)
    for seed in INPUT_SEEDS:
        x = draw(torch.Generator().manual_seed(seed))
        row.size = list(x.shape)
        _ask(row, Question(model, x, directions(model)))
        if row.verdict != ROUNDED:
            break
    row.seconds = round(time.monotonic() - start, 1)
    return row


def _ask(row: Row, question: Question) -> None:
    """One input more."""
    try:
        exact = pytorchs(question, torch.float64)
    except Exception as problem:
        exact = None
        row.verdict, row.reason = UNKNOWN, f"torch.func.jvp in float64: {_line(problem)}"
    try:
        seen = Seen()
        found = ours(question, during=watched(seen))
    except Exception as problem:
        row.verdict = REFUSED if isinstance(problem, UnsupportedError) else FAILED
        row.reason = _line(problem)
        return
    row.fused = dict(sorted(seen.fused.items()))
    row.attention = seen.kind()
    if exact is None:
        return
    apart = disagreement(question, exact)
    if apart > EXACT:
        row.verdict = UNKNOWN
        row.reason = f"PyTorch's forward and reverse mode disagree in float64 by {apart:.0e}"
        return
    row.errors.append(errors(found, exact))
    row.pytorch.append(errors(pytorchs(question, torch.float32), exact))
    row.verdict = RIGHT
    if row.errors[-1].largest >= TARGET:
        row.float64 = errors(ours(question, torch.float64), exact)
        row.verdict = judge(row.errors[-1], row.pytorch[-1], row.float64)


def judge(found: Errors, pytorch: Errors, float64: Errors) -> str:
    """Of an answer that is not right: whether float32 alone is to blame."""
    pairs = zip(dataclasses.astuple(found), dataclasses.astuple(pytorch), strict=True)
    as_good = all(one <= max(2 * other, TARGET) for one, other in pairs)
    return ROUNDED if as_good and float64.largest < EXACT else WRONG


def _line(problem: BaseException) -> str:
    """Its first line."""
    return f"{type(problem).__name__}: {problem}".splitlines()[0]
