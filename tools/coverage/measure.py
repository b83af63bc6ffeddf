"""One row of the sweep: the verdict on one model."""

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
EXACT = 1e-9  # rounding of float64 at most
INPUT_SEEDS = (3, 4, 5, 6, 7)

RIGHT, ROUNDED, WRONG = "right", "float32", "wrong"
REFUSED, FAILED, UNKNOWN = "refused", "failed", "no answer"


@dataclass
class Row:
    """A model's line; `tools/coverage/page.py` explains the verdicts."""

    member: dict[str, Any]
    verdict: str = UNKNOWN
    reason: str = ""  # the error message, where there are no numbers
    size: list[int] = field(default_factory=list)
    parameters: int = 0
    attention: str = ""
    parts: list[str] = field(default_factory=list)
    fused: dict[str, int] = field(default_factory=dict)
    errors: list[Errors] = field(default_factory=list)  # ours, by input, until one is right
    pytorch: list[Errors] = field(default_factory=list)  # PyTorch's own, for the same inputs
    float64: Errors | None = None  # ours at the last input, where float32 was not right
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
    """The row of a member; `built` replaces `member.build()`."""
    row, start = Row(member.to_json()), time.monotonic()
    torch.manual_seed(0)
    model, draw = built or member.build()
    shake(model)
    row.parameters, row.parts = sum(p.numel() for p in model.parameters()), parts(model)
    for seed in INPUT_SEEDS:
        x = draw(torch.Generator().manual_seed(seed))
        row.size = list(x.shape)
        _add_input(row, Question(model, x, directions(model)))
        if row.verdict != ROUNDED:
            break
    row.seconds = round(time.monotonic() - start, 1)
    return row


def _add_input(row: Row, question: Question) -> None:
    """Add the errors at one input, and set the verdict."""
    try:
        exact = pytorchs(question, torch.float64)
    except Exception as problem:
        exact = None
        row.verdict, row.reason = UNKNOWN, f"torch.func.jvp in float64: {first_line(problem)}"
    try:
        seen = Seen()
        found = ours(question, during=watched(seen))
    except Exception as problem:
        row.verdict = REFUSED if isinstance(problem, UnsupportedError) else FAILED
        row.reason = first_line(problem)
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
        # PyTorch's derivative of hardsigmoid multiplies by a sixth in float32, in float64 too.
        exact_to = torch.finfo(torch.float32).eps if "hardsigmoid" in row.fused else EXACT
        row.verdict = judge(row.errors[-1], row.pytorch[-1], row.float64, exact_to)


def judge(found: Errors, pytorch: Errors, float64: Errors, exact_to: float = EXACT) -> str:
    """ROUNDED if an error above TARGET comes from float32 alone, else WRONG."""
    pairs = zip(dataclasses.astuple(found), dataclasses.astuple(pytorch), strict=True)
    as_good = all(one <= max(2 * other, TARGET) for one, other in pairs)
    return ROUNDED if as_good and float64.largest < exact_to else WRONG


def first_line(problem: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(problem).__name__}: {problem}".splitlines()[0]
