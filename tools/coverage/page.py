"""docs/coverage.md, from the stored rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tools.coverage.class_tokens import STORED as CLASS_TOKENS
from tools.coverage.measure import RIGHT, ROUNDED, WRONG, Row
from tools.coverage.members import TIMM
from tools.machine import ROOT

STORED = ROOT / "tools" / "coverage" / "rows.jsonl"
PAGE = ROOT / "docs" / "coverage.md"
NOTHING = "–"
HEADINGS = [
    *("family", "model", "attention", "has", "value", "tangent", "gradient"),
    *("PyTorch's", "fused calls", ""),
]

INTRODUCTION = """# Which architectures linearize

Written by `python -m tools.coverage` ([how](../tools/README.md#coverage)); do not edit.

A small member of every architecture family of timm, more where a family has several kinds of
attention, and vision transformers of torchvision, Hugging Face and PyTorch itself. Weights are
random, with noise on all of them and on every running statistic, so that no zero hides an error.
Every parameter is trained. Each model is called once before it is linearized; two images; float32.

Value, tangent and gradient of the deltas are compared with float64: `torch.func.jvp` under MATH
attention, and ordinary reverse mode, which must agree with each other. An error is
‖found − exact‖ / ‖exact‖. *PyTorch's* is the largest of the three errors of PyTorch in float32.
"""

WORDS = """
- **right**: all three errors below 1e-4.
- **float32**: an error above 1e-4, but PyTorch in float32 is as far away at the same input, and
  ours in float64 is exact to 1e-9 (1.2e-7 with hardsigmoid, whose derivative PyTorch rounds to
  float32): a ReLU switches differently in float32, or the model amplifies rounding. Up to four more
  inputs are tried; "input 3" says which one was right.
- **wrong**: any other error above 1e-4.
- **refused**: an `UnsupportedError` that names the operation. **failed**: any other exception.
- **no answer**: PyTorch has no derivative in float64, or its two modes disagree.

Families whose smallest member is too large for two cores have fewer blocks or smaller images, as
the second column says. *Fused calls* are the calls with tangents that `fused_forward_ad` replaces
in one forward pass; *by hand* means products and softmax in the model's own code, which PyTorch
differentiates.
"""


def page_of(rows: Iterable[Row]) -> str:
    """The page, with the rows in order of source, family and model."""

    def place(row: Row) -> tuple:
        source, family, model = (row.member[name] for name in ("source", "family", "model"))
        return source != TIMM, source, family, model

    known = sorted(rows, key=place)
    sources = list(dict.fromkeys(row.member["source"] for row in known))
    parts = [INTRODUCTION, counts(known), WORDS]
    for source in sources:
        chosen = [row for row in known if row.member["source"] == source]
        parts += [f"\n## {source}\n\n", _table([HEADINGS, *map(_line, chosen)])]
    unusual = [row for row in known if row.verdict != RIGHT]
    if unusual:
        parts.append("\n## Not right, and why\n\n")
        parts += [f"- `{row.member['model']}` ({row.verdict}): {_why(row)}\n" for row in unusual]
    parts.append(CLASS_TOKENS.read_text(encoding="utf-8"))
    return "".join([*parts, "\n", _circumstances(known)])


def counts(rows: Sequence[Row]) -> str:
    """The sentence that counts right families of timm and wrong models."""
    families: dict[str, set[str]] = {}
    for row in rows:
        if row.member["source"] == TIMM:
            families.setdefault(row.member["family"], set()).add(row.verdict)
    right = sum(verdicts == {RIGHT} for verdicts in families.values())
    share = 100 * right / max(len(families), 1)
    wrong = sum(row.verdict == WRONG for row in rows)
    models = Counter(row.verdict for row in rows)
    of_models = ", ".join(f"{count} {verdict}" for verdict, count in models.most_common())
    return (
        f"\n**{right} of {len(families)} families of timm right ({share:.0f} %; all their members "
        f"here), wrong without an error: {wrong}.** Of {len(rows)} models: {of_models}.\n"
    )


def _line(row: Row) -> tuple[str, ...]:
    cells = [NOTHING] * 4
    if row.errors:
        last = row.errors[-1]
        found = (last.primal, last.tangent, last.gradient, row.pytorch[-1].largest)
        cells = [f"{error:.0e}" for error in found]
    fused = ", ".join(f"{name} {count}" for name, count in row.fused.items())
    tried = f", input {len(row.errors)}" if len(row.errors) > 1 and row.verdict == RIGHT else ""
    return (
        row.member["family"],
        _model(row),
        row.attention or NOTHING,
        ", ".join(row.parts) or NOTHING,
        *cells,
        fused or NOTHING,
        row.verdict + tried,
    )


def _model(row: Row) -> str:
    """Name, options, and size of the images."""
    options = row.member["options"]
    smaller = ", ".join(f"{k}={v}" for k, v in options.items() if k != "img_size")
    size = f"{row.size[-1]} px" if len(row.size) == 4 else ""
    return "; ".join(filter(None, (row.member["model"], smaller, size)))


def _why(row: Row) -> str:
    if row.verdict in (ROUNDED, WRONG) and row.float64:
        ours = ", ".join(f"{each.largest:.0e}" for each in row.errors)
        pytorch = ", ".join(f"{each.largest:.0e}" for each in row.pytorch)
        return (
            f"largest errors {ours} of ours and {pytorch} of PyTorch's float32, by input; "
            f"in float64 ours is off by {row.float64.largest:.0e}"
        )
    return row.reason


def _table(lines: Iterable[Sequence[str]]) -> str:
    heading, *others = lines
    every = [heading, ["---"] * len(heading), *others]
    return "".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |\n" for line in every
    )


def _circumstances(rows: Sequence[Row]) -> str:
    """Machines, versions, commits and dates of all rows, in one line."""
    about: dict[str, dict[str, None]] = {}  # values by name, in their order
    for row in rows:
        for name, value in row.about.items():
            about.setdefault(name, {})[value] = None
    machine, dates = ", ".join(about.pop("cpu", {})), about.pop("date", {})
    others = ", ".join(f"{name} {' and '.join(values)}" for name, values in about.items())
    when = f", {min(dates)} to {max(dates)}" if dates else ""
    return f"{machine}, {others}{when}.\n"
