"""docs/coverage.md, from the stored rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.record import ROOT
from tools.coverage.measure import RIGHT, ROUNDED, WRONG, Row
from tools.coverage.members import TIMM

STORED = ROOT / "tools" / "coverage" / "rows.jsonl"
PAGE = ROOT / "docs" / "coverage.md"
NOTHING = "–"
HEADINGS = (
    "family",
    "model",
    "attention",
    "has",
    "value",
    "tangent",
    "gradient",
    "PyTorch's",
    "fused calls",
    "",
)

INTRODUCTION = """# Which architectures linearize

Written by `python -m tools.coverage` ([how](../benchmarks/README.md#coverage)); do not edit.

A small member of every architecture family of timm, more where a family has several kinds of
attention, and vision transformers of torchvision, Hugging Face and PyTorch itself. Weights are
random, with noise on all of them and on every running statistic, so nothing hides behind a zero.
Every parameter is trained. Each model is used once before it is linearized; two images; float32.

Value, tangent and gradient of the deltas are compared with float64: `torch.func.jvp` under MATH
attention, and ordinary reverse mode, which have to agree with each other. An error is the length of
the difference over the length of the exact answer. *PyTorch's* is the largest of the three errors
of PyTorch's own float32.
"""

WORDS = """
- **right**: all three errors below 1e-4.
- **float32**: an error above that, PyTorch's own float32 is as far away at the same input, and ours
  in float64 agrees with float64 to 1e-9: a ReLU that float32 switches differently, or a model that
  amplifies rounding. Then up to four more inputs are tried; "input 3" says which one was right.
- **wrong**: an error above that without such an excuse.
- **refused**: an `UnsupportedError` that names the operation. **failed**: any other error.
- **no answer**: PyTorch has none in float64.

Models whose smallest member is too large for two cores have fewer blocks, or smaller images, as the
second column says. *Fused calls* are those with tangents that `fused_forward_ad` takes over in one
forward pass; *by hand* means products and softmax in the model's own code, by PyTorch's rules.
"""


def page_of(rows: Iterable[Row]) -> str:
    """The page; rows in order of source and family."""
    known = sorted(rows, key=lambda row: (row.member["source"] != TIMM, *_place(row)))
    sources = list(dict.fromkeys(row.member["source"] for row in known))
    parts = [INTRODUCTION, counts(known), WORDS]
    for source in sources:
        chosen = [row for row in known if row.member["source"] == source]
        parts += [f"\n## {source}\n\n", _table([HEADINGS, *map(_line, chosen)])]
    unusual = [row for row in known if row.verdict != RIGHT]
    if unusual:
        parts.append("\n## Not right, and why\n\n")
        parts += [f"- `{row.member['model']}` ({row.verdict}): {_why(row)}\n" for row in unusual]
    return "".join([*parts, "\n", _circumstances(known)])


def counts(rows: Sequence[Row]) -> str:
    """Families of timm that are right, and how many rows are wrong."""
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
        f"here), silently wrong: {wrong}.** Of {len(rows)} models: {of_models}.\n"
    )


def _place(row: Row) -> tuple[str, str, str]:
    return row.member["source"], row.member["family"], row.member["model"]


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
    """Name, what was made smaller, and the size of its image."""
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
    """On what it was measured: each value, or the several."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for name, value in row.about.items():
            known = about.setdefault(name, [])
            if value not in known:
                known.append(value)
    machine = ", ".join(about.pop("cpu", []))
    dates = about.pop("date", [])
    others = ", ".join(f"{name} {' and '.join(values)}" for name, values in about.items())
    when = f", {min(dates)} to {max(dates)}" if dates else ""
    return f"{machine}, {others}{when}.\n"
