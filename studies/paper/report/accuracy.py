"""The page's part on accuracy: tables of every way, the best of each family, costs, a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from studies.paper.cells import Found
from studies.paper.methods import HEAD, METHODS, OURS, PROBE_RATE, SMALL, THEIRS
from studies.paper.outcomes import right
from studies.paper.parts import accuracy
from studies.paper.report.claims import Claim
from studies.paper.report.section import Section
from studies.paper.report.summary import Mean, gain, listed
from tangent_ops import pictures

MARKS = {"square": ("o", True), "cross-entropy": ("s", False)}  # marker, whether it is filled
FAMILIES = (OURS, THEIRS, SMALL, HEAD)
AIMED = 0.75  # of the sets: there the best TAFT is not below the best NLFT
PROBE = "probe"
Way = tuple[str, str]  # method, loss


@dataclass(frozen=True)
class Runs:
    """One regime on one set: the cells of each loss, by seed."""

    cells: dict[str, list[dict[str, Any]]]

    @property
    def ways(self) -> list[Way]:
        """Of both losses, in the order of tables."""
        return [(m, x) for x, cells in self.cells.items() for m in METHODS if m in cells[0]["ways"]]

    def has(self, way: Way, key: str = "test") -> bool:
        return way in self.ways and key in self.cells[way[1]][0]["ways"][way[0]]

    def of(self, way: Way, key: str = "test") -> np.ndarray:
        """Whether each test image is right, (S, I)."""
        method, loss = way
        return np.stack([right(cell["ways"][method][key]) for cell in self.cells[loss]])

    def taken(self, family: str) -> list[Way]:
        """For each seed, the way of a family that is best on validation images; the first, if tied.

        Empty if no way is of the family.
        """
        ways = [way for way in self.ways if METHODS[way[0]].family == family]
        seeds = range(len(next(iter(self.cells.values())))) if ways else ()
        return [max(ways, key=lambda way: self._validation(way, seed)) for seed in seeds]

    def best(self, family: str, key: str = "test") -> np.ndarray:
        """As `of`, for the way that was taken for each seed."""
        return np.stack([self.of(way, key)[s] for s, way in enumerate(self.taken(family))])

    def _validation(self, way: Way, seed: int) -> float:
        return self.cells[way[1]][seed]["ways"][way[0]]["validation"]


@dataclass(frozen=True)
class Regime:
    """One regime: its name, what its cells were given, and its runs by set."""

    name: str
    given: dict[str, Any]
    sets: dict[str, Runs]

    @property
    def shifted(self) -> list[str]:
        """The sets that have their test images drawn by others."""
        return [images for images, runs in self.sets.items() if runs.has(runs.ways[0], "shifted")]

    @property
    def ways(self) -> list[Way]:
        return next(iter(self.sets.values())).ways

    def columns(self) -> Iterator[tuple[str, Runs, str]]:
        """Of tables: title, runs, and which test images."""
        for images, runs in self.sets.items():
            yield images, runs, "test"
        for images in self.shifted:
            yield f"{images}, shifted", self.sets[images], "shifted"

    def pooled(self, way: Way) -> np.ndarray:
        """Of the test images of all sets, side by side."""
        return np.concatenate([runs.of(way) for runs in self.sets.values()], axis=1)

    def pooled_best(self, family: str) -> np.ndarray:
        return np.concatenate([runs.best(family) for runs in self.sets.values()], axis=1)


def regimes(found: Found) -> list[Regime]:
    """Of all cells that are not costs."""
    cells = [cell for cell in found.of(accuracy.PART) if cell["loss"] != accuracy.COSTS]
    result = []
    for name in dict.fromkeys(cell["regime"] for cell in cells):
        sets: dict[str, Runs] = {}
        for images in dict.fromkeys(c["images"] for c in cells if c["regime"] == name):
            given: dict[str, Any] = {"regime": name, "images": images}
            by_loss = {
                loss: sorted(
                    found.of(accuracy.PART, loss=loss, **given), key=lambda cell: cell["seed"]
                )
                for loss in accuracy.LOSSES
            }
            sets[images] = Runs({loss: group for loss, group in by_loss.items() if group})
        result.append(Regime(name, next(c for c in cells if c["regime"] == name), sets))
    return result


def section(found: Found, out: Path) -> Section:
    """All of it."""
    every = regimes(found)
    text = []
    for regime in every:
        text += [_table(regime), _best(regime)]
    figure = _draw(every, out / "accuracy.png")
    return Section(
        "Accuracy",
        _findings(every),
        "\n\n".join([*text, _costs(found)]),
        [(figure, "Test accuracy of every way, minus the probe's with the same loss")],
        _claims(every),
    )


def _table(regime: Regime) -> str:
    given, columns = regime.given, list(regime.columns())
    rows = ["| loss | method | " + " | ".join(title for title, _, _ in columns) + " |"]
    rows.append("| --- " * (2 + len(columns)) + "|")
    for way in regime.ways:
        shown = [Mean.crossed(runs.of(way, key)).percent() for _, runs, key in columns]
        rows.append(f"| {way[1]} | {METHODS[way[0]].title} | " + " | ".join(shown) + " |")
    return (
        f"**{regime.name}**: {given['train']} training images, {given['validation']} validation "
        f"images, {given['epochs']} passes in batches of {given['batch']} (the probe's own recipe, "
        "and exact fits, take as many as they need). All start from a probe with the same loss, of "
        f"a rate of {PROBE_RATE:g}. Test accuracy, %, at the rate (for exact fits, the l2) that is "
        "best on each seed's validation images.\n\n" + "\n".join(rows) + _unconverged(regime)
    )


def _unconverged(regime: Regime) -> str:
    """What Newton-CG tells of its fits; empty if none was made."""
    told = [
        way["told"]
        for runs in regime.sets.values()
        for cells in runs.cells.values()
        for cell in cells
        for way in cell["ways"].values()
        if "converged" in way["told"]
    ]
    if not told:
        return ""
    converged = sum(entry["converged"] for entry in told)
    return (
        f"\n\nNewton-CG converged in {converged} of {len(told)} chosen fits: by the gradient's "
        "norm, the deltas are within "
        f"{100 * max(entry['bound'] for entry in told):.2g} % of their norm of the optimum, or "
        "closer."
    )


def _best(regime: Regime) -> str:
    columns = list(regime.columns())
    rows = ["| best of | " + " | ".join(title for title, _, _ in columns) + " |"]
    rows.append("| --- " * (1 + len(columns)) + "|")
    lines = []
    for family in _families(regime):
        shown = [Mean.crossed(runs.best(family, key)).percent() for _, runs, key in columns]
        rows.append(f"| {family} | " + " | ".join(shown) + " |")
        taken = Counter(way for runs in regime.sets.values() for way in runs.taken(family))
        counts = [f"{METHODS[m].title}, {x}: {n}" for (m, x), n in taken.most_common()]
        lines.append(f"- {family}: " + "; ".join(counts))
    return (
        "The best of each family: for each seed, the way with the highest validation accuracy. "
        "Test images choose nothing.\n\n" + "\n".join(rows) + "\n\n<details><summary>How often "
        "each way was taken, over sets and seeds</summary>\n\n"
        + "\n".join(lines)
        + "\n\n</details>"
    )


def _families(regime: Regime) -> list[str]:
    present = {METHODS[method].family for method, _ in regime.ways}
    return [family for family in FAMILIES if family in present]


def _costs(found: Found) -> str:
    cells = found.of(accuracy.PART, loss=accuracy.COSTS)
    rows = ["| regime | method | loss | trained numbers | time of a fit, s | peak memory, MB |"]
    rows.append("| --- " * 6 + "|")
    for cell in cells:
        for method, cost in cell["costs"].items():
            rows.append(
                f"| {cell['regime']} | {METHODS[method].title} | {cost['loss']} | "
                f"{cost['numbers']:,} | {cost['seconds']:.1f} | {cost['bytes'] / 1e6:.0f} |"
            )
    return (
        f"What one fit costs, on {cells[0]['images']}, from cached tokens, with nothing kept from "
        "another fit; and the most memory that torch holds in a fit of one pass, its copies of the "
        "model included. Other work ran beside it.\n\n" + "\n".join(rows)
    )


def _findings(every: list[Regime]) -> list[str]:
    """What was aimed at first."""
    main = every[0]

    def leads(family: str, key: str = "test") -> dict[str, Mean]:
        return {
            images: gain(runs.best(OURS, key), runs.best(family, key))
            for images, runs in main.sets.items()
            if runs.has(runs.ways[0], key)
        }

    over = leads(THEIRS)
    kept = [images for images, lead in over.items() if lead.value >= -2 * lead.error]
    needed = math.ceil(AIMED * len(over))
    lines = [
        f"{'Reached' if len(kept) >= needed else 'Missed'}: the best TAFT should not be below the "
        f"best NLFT by more than two standard errors on at least {needed} of {len(over)} sets; "
        f"that holds on {len(kept)}. TAFT less NLFT: {listed(over)}."
    ]
    probes = leads(HEAD)
    above = [images for images, lead in probes.items() if lead.value > 2 * lead.error]
    lines.append(
        f"TAFT less the best probe: {listed(probes)}; beyond two standard errors on {len(above)}."
    )
    rest = [
        f"{images} drawn by others {lead.points()}"
        for images, lead in leads(THEIRS, "shifted").items()
    ]
    rest += [
        f"three blocks and few images {claim.shown()}"
        for claim in _claims(every)
        if claim.text == _DEEPER
    ]
    if rest:
        lines.append(f"TAFT less NLFT elsewhere: {'; '.join(rest)}.")
    return lines


_DEEPER = (
    "all sets, few images: TAFT-3, square loss, is not less accurate than NLFT-3, cross-entropy"
)
_SHIFTED = "drawn by others: the best TAFT is not less accurate than the best NLFT"


def _claims(every: list[Regime]) -> list[Claim]:
    """On each set of the first regime, over its sets together, and of the deeper ways."""
    main, claims = every[0], []
    deep = next((regime for regime in every if ("taft-3", "square") in regime.ways), every[-1])

    def claim(
        text: str, first: np.ndarray, second: np.ndarray, wanted: Literal["higher", "not lower"]
    ) -> None:
        claims.append(Claim(text, gain(first, second), wanted))

    for images, runs in main.sets.items():
        ours = runs.best(OURS)
        text = f"{images}: the best TAFT is not less accurate than the best NLFT"
        claim(text, ours, runs.best(THEIRS), "not lower")
        text = f"{images}: the best TAFT is more accurate than the best probe"
        claim(text, ours, runs.best(HEAD), "higher")
    for images in main.shifted:
        best = [main.sets[images].best(family, "shifted") for family in (OURS, THEIRS)]
        claim(f"{images} {_SHIFTED}", best[0], best[1], "not lower")
    if SMALL in _families(main):
        text = "all sets: the best TAFT is not less accurate than the best of LoRA and adapters"
        claim(text, main.pooled_best(OURS), main.pooled_best(SMALL), "not lower")
    square, entropy = MARKS
    compared: list[tuple[Regime, str, Way, Way, Literal["higher", "not lower"]]] = [
        *(
            (main, f"all sets: TAFT-1 is not less accurate than NLFT-1, both by AdamW, {loss}",
             ("taft-1", loss), ("nlft-1", loss), "not lower")
            for loss in MARKS
        ),
        (main, "all sets: TAFT-1 by AdamW gains from the square loss, against cross-entropy",
         ("taft-1", square), ("taft-1", entropy), "higher"),
        (main, "all sets: the exact optimum of the square loss is not less accurate than AdamW's",
         ("taft-1-exact", square), ("taft-1", square), "not lower"),
        (main, "all sets: the exact optimum of cross-entropy is not less accurate than AdamW's",
         ("taft-1-newton", entropy), ("taft-1", entropy), "not lower"),
        (deep, _DEEPER, ("taft-3", square), ("nlft-3", entropy), "not lower"),
        (deep, "all sets, few images: TAFT-3 is more accurate than TAFT-1, square loss",
         ("taft-3", square), ("taft-1", square), "higher"),
    ]  # fmt: skip
    for regime, text, first, second, wanted in compared:
        if first in regime.ways and second in regime.ways:
            claim(text, regime.pooled(first), regime.pooled(second), wanted)
    return claims


@pictures.styled()
def _draw(every: list[Regime], path: Path) -> Path:
    """A panel to each set; a row of them to each regime."""
    shown = [[m for m in METHODS if m != PROBE and m in dict(r.ways)][::-1] for r in every]
    heights = [len(methods) for methods in shown]
    sets = list(dict.fromkeys(images for regime in every for images in regime.sets))
    figure = pictures.new_figure(height=1.3 + 0.3 * sum(heights) + 0.5 * len(every))
    grid = figure.add_gridspec(len(every), len(sets), height_ratios=heights)
    for number, (regime, methods) in enumerate(zip(every, shown, strict=True)):
        first = None
        for images, runs in regime.sets.items():
            column = sets.index(images)
            each = figure.add_subplot(grid[number, column], sharex=first)
            first = first or each
            _draw_gains(each, runs, methods)
            each.tick_params(labelleft=column == 0, left=column == 0)
            each.set_title(f"{images}, {regime.given['train']}")
    keys = {
        {"square": "square loss"}.get(loss, loss): Line2D(
            [], [], color=pictures.LEVEL, marker=mark, linestyle="none",
            markerfacecolor=pictures.LEVEL if full else "white",
        )
        for loss, (mark, full) in MARKS.items()
    }  # fmt: skip
    pictures.legend_above(figure, len(keys), keys, "Test accuracy above the probe's, points")
    words = "The probe has the same loss; bars: standard errors over seeds and test images. "
    words += "Above each panel: the set, and the number of training images. A row has one scale. "
    pictures.note(figure, words + pictures.TERMS)
    return pictures.save(figure, path)


def _draw_gains(axes: Axes, runs: Runs, methods: list[str]) -> None:
    """Of each method on one set, from bottom to top."""
    for row, method in enumerate(methods):
        for offset, (loss, (mark, full)) in zip((0.15, -0.15), MARKS.items(), strict=True):
            if not runs.has((method, loss)):
                continue
            lead = gain(runs.of((method, loss)), runs.of((PROBE, loss)))
            colour = _colour(method)
            axes.errorbar(
                100 * lead.value,
                row + offset,
                xerr=0.0 if math.isnan(lead.error) else 100 * lead.error,
                marker=mark,
                color=colour,
                markerfacecolor=colour if full else "white",
            )
    axes.axvline(0, color=pictures.LEVEL, linewidth=1)
    axes.set_yticks(range(len(methods)), [METHODS[method].title for method in methods])
    axes.set_ylim(-0.5, len(methods) - 0.5)


def _colour(method: str) -> str:
    chosen = METHODS[method]
    if chosen.family == OURS:
        return pictures.TANGENT if chosen.steps else pictures.EXACT
    return pictures.ORDINARY if chosen.family == THEIRS else pictures.ORDINARY_OTHER
