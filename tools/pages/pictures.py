"""Draw the pictures of pages again whose numbers are kept in the page, or beside it.

    python -m tools.pages.pictures    # or, with all other pictures of docs/: make pictures

docs/demo.png is of docs/demo.json, which `make demo` writes anew into out/. What measured
docs/privacy.png and docs/shards-scale.png is no longer in this repository: they are drawn from the
tables and sentences of their pages, so that a picture says what its page says.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from studies.paper.report import privacy
from studies.paper.report.summary import Mean
from tangent_ops import pictures
from tools.machine import ROOT

DOCS = ROOT / "docs"
SEEDS = 3  # of docs/privacy.png
# Of each panel of docs/shards-scale.png: title, unit, rows of the table.
EACH = {
    "plan: hash, check, write": ("o", "-", pictures.BLUE),
    "train: write a delta": ("s", "-", pictures.ORANGE),
    "list what is done": ("^", "-", pictures.BLACK),
    "compose: add to the ledger": ("D", "-", pictures.GREEN),
    "check that all is in line": ("v", "--", pictures.PURPLE),
}
WHOLE = {
    "one worker: open, read its job": ("o", "-", pictures.BLUE),
    "find a sample": ("s", "--", pictures.ORANGE),
    "read the composition": ("D", ":", pictures.GREEN),
}
MEMORY = {"peak memory beyond the imports": ("o", "-", pictures.BLACK)}
PANELS = (
    ("All shards: time for each", "ms per shard", EACH),
    ("One shard, or the mean: time in all", "ms", WHOLE),
    ("Peak memory beyond the imports", "MB", MEMORY),
)


def table(page: str, first: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by its first column; `first` begins its head.

    Raises:
        ValueError: the page has no such table.
    """
    lines = page.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(first)]
    if not starts:
        raise ValueError(f"no table begins with {first!r}")
    rows: dict[str, list[str]] = {}
    for line in lines[starts[0] :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


def draw_demo(out: Path) -> Path:
    """Of the numbers that docs/demo.json keeps."""
    from picture import Results, draw  # of examples/, which `studies` makes importable

    return pictures.save(draw(Results.read(DOCS / "demo.json")), out / "demo.png")


def draw_privacy(out: Path) -> Path:
    """Of the table and the sentences in docs/promises/privacy.md."""
    page = (DOCS / "promises" / "privacy.md").read_text(encoding="utf-8")
    rows = table(page, "| training | ε = 0.5")
    epsilons = [float(cell.removeprefix("ε = ")) for cell in rows["training"]]
    names = {
        "tangent": "TAFT-1",
        "ordinary": "ordinary fine-tuning of the same block (Opacus)",
        "probe": "linear probe",
    }
    series = {
        look: dict(zip(epsilons, map(_mean, rows[names[way]]), strict=True))
        for way, look in privacy.LOOKS.items()
    }
    levels = {
        "TAFT-1, not private": _stated(page, "TAFT-1 without privacy reaches"),
        "public probe: no private image": _stated(page, "alone reaches"),
    }
    failure = float(_found(page, r"δ = (1e-\d+)"))
    return privacy.draw(epsilons, series, levels, failure, out / "privacy.png")


def _mean(cell: str) -> Mean:
    """Of "76.2 ± 0.5", in percent."""
    value, error = (float(part) / 100 for part in cell.split("±"))
    return Mean(value, error, SEEDS)


def _stated(page: str, words: str) -> Mean:
    return _mean(_found(page, re.escape(words).replace(r"\ ", r"\s+") + r"\s+(\d+\.\d ± \d+\.\d)"))


def _found(page: str, pattern: str) -> str:
    match = re.search(pattern, page)
    if match is None:
        raise ValueError(f"docs/promises/privacy.md has no {pattern!r}")
    return match[1]


@pictures.styled()
def draw_shards(out: Path) -> Path:
    """Of the table in docs/cluster.md."""
    rows = table((DOCS / "cluster.md").read_text(encoding="utf-8"), "| | 100 shards")
    counts = [int(cell.split()[0].replace(",", "")) for cell in rows[""]]
    figure = pictures.new_figure(height=7.2)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.6))
    drawn = []
    for axes, (title, unit, lines) in zip(panels, PANELS, strict=True):
        axes.set_title(title)
        axes.set_ylabel(unit)
        pictures.number_axis(axes, counts)
        drawn.append((axes, _draw_lines(axes, counts, rows, lines)))
        if lines is MEMORY:
            axes.set_ylim(0, 1.12 * max(value for value, _, _ in drawn[-1][1]))
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.minorticks_off()
    panels[-1].set_xlabel("shards")
    pictures.note(figure, "Times are on logarithmic scales, memory is not.")
    for axes, ends in drawn:
        if len(ends) > 1:
            pictures.label_ends(axes, ends, size=pictures.SMALL)
    return pictures.save(figure, out / "shards-scale.png")


def _draw_lines(
    axes: Axes,
    counts: Sequence[int],
    rows: Mapping[str, Sequence[str]],
    lines: Mapping[str, tuple[str, str, str]],
) -> list[tuple[float, str, str]]:
    """Draw rows of the table; return the last value, name and colour of each."""
    ends = []
    for name, (marker, line, colour) in lines.items():
        values = [float(cell.split()[0]) for cell in rows[name]]
        look = pictures.Look(name, marker, line, colour)
        axes.plot(counts, values, **look.drawn)
        ends.append((values[-1], name, colour))
    return ends


def main() -> int:
    """Write the pictures into docs/."""
    for path in (draw_demo(DOCS), draw_privacy(DOCS), draw_shards(DOCS)):
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
