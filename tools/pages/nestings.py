"""Writes docs/nestings.md, the outcome of every nesting: python -m tools.pages.nestings"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import tangent_ops
from tests.ops import oracle
from tests.ops.transforms import CELLS, DEEP, REASONS, TRANSFORMS, TRIPLES, Cell, Op, outcome, title

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "nestings.md"
VERSION = torch.__version__.split("+")[0]

attention = tangent_ops.scaled_dot_product_attention
BACKENDS: dict[str, Op] = {
    "default": attention,
    "reference": functools.partial(attention, backend="reference"),
    "triton": functools.partial(attention, backend="triton"),
}
MATH: Op = oracle.math_attention
EAGER = [cell for cell in CELLS if "compile" not in cell]
HEADINGS = {
    "default": "The default on a CPU: PyTorch's own, or the reference where an operand is dual",
    "reference": '`backend="reference"`',
    "triton": '`backend="triton"`, here interpreted on a CPU',
}
MEANINGS = {
    "jvp": "`torch.func.jvp`: value and tangent along a fixed direction",
    "vjp": "`torch.func.vjp`: a fixed cotangent pulled back",
    "grad": "`torch.func.grad` of a weighted sum",
    "vmap": "`torch.func.vmap` over two inputs",
    "jacfwd": "`torch.func.jacfwd` with respect to two coefficients that the input is made from",
    "jacrev": "`torch.func.jacrev` of two weighted sums, with respect to the same two",
    "hessian": "`torch.func.hessian` of a weighted sum, with respect to the same two",
    "linearize": "`torch.func.linearize`: value, and the linear map at a second tangent",
    "dual_level": "`torch.autograd.forward_ad.dual_level()`: value and tangent",
    "checkpoint": "`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`; the cell then "
    "includes the gradient by a last backward pass, which recomputes the checkpoint",
    "autocast": "`torch.autocast` to bfloat16, of float32 inputs",
    "compile": '`torch.compile(..., fullgraph=True, backend="aot_eager")`',
}
INTRO = """\
# Nestings of transforms

<!-- Written by `python -m tools.pages.nestings`; do not edit. -->

What `tangent_ops.scaled_dot_product_attention` does in every pair of PyTorch's transforms, with
torch {version}. The row is the outer transform, the column the inner one: row `grad`, column `jvp`
is `grad(jvp(attention))`. The row and column `-` are one transform alone. Nestings of three follow
below each table.

**✓** means right: the result agrees with PyTorch's MATH attention in the same nesting in float64,
within rounding. A word says [why the cell raises an error](#why-a-cell-raises). Only cells marked
*pytorch* are wrong without an error: PyTorch's own `torch.func.linearize` is wrong there for any
function, even elementwise ones; use `torch.func.jvp` instead. `tests/ops/test_attention_matrix.py`
evaluates all cells.
"""


def run_all(backend: str) -> dict[Cell, str]:
    """The outcome of every cell, by a backend that runs in this process."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    return {cell: outcome(cell, BACKENDS[backend], dtype) for cell in CELLS}


def run_interpreted() -> dict[Cell, str]:
    """The outcome of every cell by the Triton backend, interpreted in a process of its own."""
    code = (
        "import json; from tools.pages.nestings import run_all; "
        "print(json.dumps(list(run_all('triton').items())))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    pairs = json.loads(done.stdout.splitlines()[-1])
    return {tuple(cell): found for cell, found in pairs}


def as_text(cell: Cell) -> str:
    """A nesting as the page writes it: a(b), or - where there is none."""
    return "(".join(cell) + ")" * (len(cell) - 1) if cell else "-"


def as_cell(text: str) -> Cell:
    return () if text == "-" else tuple(text.rstrip(")").split("("))


def row(*entries: str) -> str:
    return f"| {' | '.join(entries)} |"


def table(found: dict[Cell, str], outers: Iterable[Cell], inners: Iterable[str]) -> list[str]:
    """Markdown, one row for each outer nesting; blank where there is no such cell."""

    def text(cell: Cell) -> str:
        return found.get(cell, "").removeprefix("raises ").replace("right", "✓")

    cells = [[(*outer, *inner) for inner in map(as_cell, inners)] for outer in outers]
    names = [as_text(outer) for outer in outers]
    return [
        row("outer \\ inner", *inners),
        row("---", *("---" for _ in inners)),
        *(row(name, *map(text, line)) for name, line in zip(names, cells, strict=True)),
    ]


def tables(found: dict[Cell, str]) -> list[str]:
    """The pairs, and below them the triples."""
    pairs = table(found, [(), *((name,) for name in TRANSFORMS)], ["-", *TRANSFORMS])
    outers = sorted({cell[:2] for cell in TRIPLES}, key=[cell[:2] for cell in TRIPLES].index)
    return [*pairs, "", "Three deep:", "", *table(found, outers, DEEP)]


def page(outcomes: dict[str, dict[Cell, str]]) -> str:
    """The whole of docs/nestings.md."""
    lines = [INTRO.format(version=VERSION)]
    lines += [f"- `{name}`: {MEANINGS[name]}." for name in TRANSFORMS]
    for backend, found in outcomes.items():
        lines += ["", f"## {HEADINGS[backend]}", "", *tables(found)]
    lines += ["", "## Why a cell raises", ""]
    raised = {it for found in outcomes.values() for it in found.values()}
    lines += [f"- **{n}**: {r.means}" for n, r in REASONS.items() if f"raises {n}" in raised]
    lines += [
        "",
        "Where the reference raises, PyTorch's MATH attention raises the same: the limit is "
        "PyTorch's, for any operation.",
    ]
    if wrong := [as_text(cell) for cell in EAGER if outcome(cell, MATH).startswith("wrong")]:
        lines += [
            "",
            f"PyTorch's MATH attention itself is wrong without an error in: {', '.join(wrong)}. "
            "(The forward-mode rule of its softmax changes in place what the backward pass needs.)",
        ]
    return "\n".join(lines) + "\n"


def documented(backend: str) -> dict[Cell, str] | None:
    """The outcomes that the page states; None if it was written with another torch."""
    text = PAGE.read_text(encoding="utf-8")
    if f"torch {VERSION}." not in text:
        return None
    section = text.split(f"## {HEADINGS[backend]}\n")[1].split("\n## ")[0]
    told: dict[Cell, str] = {}
    inners: list[Cell] = []
    for line in section.splitlines():
        first, *entries = [x.strip() for x in line.split("|")[1:-1]] or [""]
        if first.startswith("outer"):
            inners = [as_cell(entry) for entry in entries]
        else:
            outer = as_cell(first)
            told |= {(*outer, *i): x for i, x in zip(inners, entries, strict=False)}
    words = {"✓": "right", "pytorch": "pytorch"}
    return {c: words.get(told[c], f"raises {told[c]}") for c in CELLS}


def acceptable(found: str) -> bool:
    """Whether an outcome is right, PyTorch's fault, or an error that names a known reason."""
    return found in ("right", "pytorch") or found.removeprefix("raises ") in REASONS


def check(cell: Cell, backend: str, dtype: torch.dtype, device: str) -> str:
    """Assert that a cell is right or raises by name, and does what the page says; its outcome."""
    found = outcome(cell, BACKENDS[backend], dtype, device)
    assert not found.startswith("wrong"), found
    # An error that names no known reason is PyTorch's own if its attention raises the same.
    assert acceptable(found) or found == outcome(cell, MATH, dtype, device), found
    if device == "cpu" and (told := documented(backend)) is not None:
        assert found == told[cell], "run: python -m tools.pages.nestings"
    return found


def main() -> None:
    runs: dict[str, Callable[[], dict[Cell, str]]] = {
        "default": lambda: run_all("default"),
        "reference": lambda: run_all("reference"),
        "triton": run_interpreted,
    }
    outcomes = {name: run() for name, run in runs.items()}
    PAGE.write_text(page(outcomes), encoding="utf-8")
    print(f"wrote {PAGE}")
    bad = [
        f"{backend}, {title(cell)}: {it}"
        for backend, found in outcomes.items()
        for cell, it in found.items()
        if not acceptable(it)
    ]
    if bad:
        sys.exit("\n".join(["neither right nor raised by name:", *bad]))


if __name__ == "__main__":
    main()
