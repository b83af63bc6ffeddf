"""The page's part on accuracy: a table for each set, a plot, and what is claimed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from studies.paper.cells import Found
from studies.paper.methods import METHODS, exact
from studies.paper.parts import accuracy
from studies.paper.report.claims import Claim
from studies.paper.report.section import Section
from studies.paper.report.summary import Mean, paired
from tangent_ops import pictures

MARKS = {"square": ("o", True), "cross-entropy": ("s", False)}  # marker, whether it is filled


def scores(found: Found, images: str, method: str, loss: str, key: str = "test_accuracy"):
    """Of every seed at the rate that was chosen, in the order of seeds; empty if not run."""
    given: dict[str, Any] = {"images": images, "method": method, "loss": loss}
    rates = accuracy.PROBE_RATES if method == accuracy.PROBE else METHODS[method].rates
    best = accuracy.chosen(found, len(rates), **given)
    if best is None:
        return []
    cells = found.of(accuracy.PART, rate=best["rate"], **given)
    return [cell[key] for cell in sorted(cells, key=lambda cell: cell["seed"]) if key in cell]


def section(found: Found, out: Path) -> Section:
    """All of it."""
    cells = found.of(accuracy.PART)
    sets = list(dict.fromkeys(cell["images"] for cell in cells))
    present = {(cell["method"], cell["loss"]) for cell in cells}
    order = [accuracy.PROBE, *METHODS]
    losses = [loss for loss in MARKS if any(entry == loss for _, entry in present)]
    runs = [(m, loss) for loss in losses for m in order if (m, loss) in present]
    shifted = list(dict.fromkeys(c["images"] for c in cells if "shifted_accuracy" in c))
    text = [_table(found, sets, shifted, runs), _costs(found, runs), _tried(found, sets, runs)]
    figure = _draw(found, sets, runs, out / "accuracy.png")
    return Section(
        "Accuracy: probe, ordinary and tangent fine-tuning",
        "\n\n".join(text),
        [(figure, "Test accuracy of every method, minus the probe's with the same loss")],
        _claims(found, sets),
    )


def title(method: str) -> str:
    """What tables call a method."""
    return "linear probe" if method == accuracy.PROBE else METHODS[method].title


def _table(found: Found, sets: list[str], shifted: list[str], runs: list[tuple[str, str]]) -> str:
    columns = [*sets, *(f"{images}, shifted" for images in shifted)]
    head = "| loss | method | " + " | ".join(columns) + " |"
    rows = [head, "| --- " * (2 + len(columns)) + "|"]
    for method, loss in runs:
        values = [scores(found, images, method, loss) for images in sets]
        values += [scores(found, images, method, loss, "shifted_accuracy") for images in shifted]
        shown = [Mean.of(value).percent() if value else "–" for value in values]
        rows.append(f"| {loss} | {title(method)} | " + " | ".join(shown) + " |")
    return "Test accuracy, %; mean over seeds ± its standard error.\n\n" + "\n".join(rows)


def _costs(found: Found, runs: list[tuple[str, str]]) -> str:
    where = found.of(accuracy.MEMORY)[0]["images"]
    rows = ["| method | loss | passes | trained numbers | time of a fit, s | peak memory, MB |"]
    rows.append("| --- " * 6 + "|")
    for method, loss in runs:
        given = {"method": method, "loss": loss, "images": where}
        measured, cells = found.of(accuracy.MEMORY, **given), found.of(accuracy.PART, **given)
        if not measured:
            continue
        seconds = Mean.of([cell["seconds"] for cell in cells]).value
        rows.append(
            f"| {title(method)} | {loss} | {_passes(cells[0])} | {cells[0]['parameters']:,} | "
            f"{seconds:.1f} | {measured[0]['bytes'] / 1e6:.0f} |"
        )
    return (
        f"What a fit costs, on {where}: the time of one on cached tokens, and the most memory "
        f"that torch holds while the method trains on one batch of {accuracy.MEMORY_SAMPLES}, its "
        "copies of the model included.\n\n" + "\n".join(rows)
    )


def _passes(cell: dict[str, Any]) -> str:
    """Over the data; an exact fit takes as many as it needs."""
    return "–" if METHODS[cell["method"]].train is exact else str(cell["epochs"])


def _tried(found: Found, sets: list[str], runs: list[tuple[str, str]]) -> str:
    rows = ["| loss | method | " + " | ".join(sets) + " |"]
    rows.append("| --- " * (2 + len(sets)) + "|")
    for method, loss in runs:
        shown = []
        for images in sets:
            given = {"images": images, "method": method, "loss": loss}
            cells = found.of(accuracy.PART, seed=accuracy.TUNED_ON, **given)
            shown.append(
                "; ".join(
                    f"{cell['rate']:g}: {100 * cell['validation_accuracy']:.1f} "
                    f"({100 * cell['test_accuracy']:.1f})"
                    for cell in sorted(cells, key=lambda cell: cell["rate"])
                )
                or "–"
            )
        rows.append(f"| {loss} | {title(method)} | " + " | ".join(shown) + " |")
    return (
        "<details><summary>The rates that were tried, on seed 0</summary>\n\nValidation accuracy, "
        "%, which chose, and in brackets test accuracy, which did not. Validation images are few "
        "and so are the rates: where two are close, the choice is luck, for every method alike.\n\n"
        + "\n".join(rows)
        + "\n\n</details>"
    )


@pictures.styled()
def _draw(found: Found, sets: list[str], runs: list[tuple[str, str]], path: Path) -> Path:
    """A panel per set; below, the methods that were not tried on every set."""
    methods = [m for m in dict.fromkeys(m for m, _ in runs) if m != accuracy.PROBE]
    tried = {m: [s for s in sets if any(scores(found, s, m, x) for x in MARKS)] for m in methods}
    everywhere = [m for m in methods if tried[m] == sets]
    rest = [m for m in methods if tried[m] != sets]
    rows = [(everywhere, sets), (rest, [s for s in sets if any(s in tried[m] for m in rest)])]
    rows = [row for row in rows if row[0]]
    figure = pictures.new_figure(height=1.3 + 0.36 * len(methods) + 0.3 * len(rows))
    grid = figure.add_gridspec(len(rows), len(sets), height_ratios=[len(m) for m, _ in rows])
    first = None
    for number, (shown, on) in enumerate(rows):
        for column, images in enumerate(sets):
            if images not in on:
                continue
            each = figure.add_subplot(grid[number, column], sharex=first)
            first = first or each
            _draw_gains(each, found, images, shown[::-1])
            each.tick_params(labelleft=column == 0, left=column == 0)
            each.set_title(images if number == 0 else f"{images} only")
    keys = {
        {"square": "square loss"}.get(loss, loss): Line2D(
            [], [], color=pictures.LEVEL, marker=mark,
            markerfacecolor=pictures.LEVEL if full else "white",
        )
        for loss, (mark, full) in MARKS.items()
    }  # fmt: skip
    pictures.legend_above(figure, 2, keys)
    words = "Points above the probe that has the same loss; bars: standard errors over seeds."
    pictures.note(figure, f"{words} All panels have the same scale. {pictures.TERMS}")
    return pictures.save(figure, path)


def _draw_gains(axes: Axes, found: Found, images: str, methods: list[str]) -> None:
    """Of each method on one set, from bottom to top."""
    for row, method in enumerate(methods):
        for offset, (loss, (mark, full)) in zip((0.15, -0.15), MARKS.items(), strict=True):
            values = scores(found, images, method, loss)
            if not values:
                continue
            gain = paired(values, scores(found, images, accuracy.PROBE, loss))
            colour = _colour(method)
            axes.errorbar(
                100 * gain.value,
                row + offset,
                xerr=100 * gain.error,
                marker=mark,
                color=colour,
                markerfacecolor=colour if full else "white",
            )
    axes.axvline(0, color=pictures.LEVEL, linewidth=1)
    axes.set_yticks(range(len(methods)), [title(method) for method in methods])
    axes.set_ylim(-0.5, len(methods) - 0.5)


def _colour(method: str) -> str:
    if "exact" in method:
        return pictures.EXACT
    if method.startswith("taft"):
        return pictures.TANGENT
    return pictures.ORDINARY if method.startswith("nlft") else pictures.ORDINARY_OTHER


def _claims(found: Found, sets: list[str]) -> list[Claim]:
    claims = []

    def claim(text: str, first: list[float], second: list[float], wanted: Any, why: str) -> None:
        if first and second:
            claims.append(Claim(text, paired(first, second), wanted, why))

    for images in sets:
        square = {m: scores(found, images, m, "square") for m in (accuracy.PROBE, *METHODS)}
        compared = (accuracy.PROBE, "nlft-1", "taft-1")
        entropy = {m: scores(found, images, m, "cross-entropy") for m in compared}
        claim(
            f"{images}: TAFT-1 is not less accurate than NLFT-1, square loss",
            square["taft-1"],
            square["nlft-1"],
            "not lower",
            "Ordinary fine-tuning moves the block's features along the way; a first-order model "
            "keeps those of the anchor.",
        )
        claim(
            f"{images}: TAFT-1 is not less accurate than NLFT-1, cross-entropy",
            entropy["taft-1"],
            entropy["nlft-1"],
            "not lower",
            "Cross-entropy asks for ever larger outputs, which a linear model reaches by larger "
            "deltas, far from where it resembles the network.",
        )
        claim(
            f"{images}: TAFT-1, square loss, is not less accurate than NLFT-1, cross-entropy",
            square["taft-1"],
            entropy["nlft-1"],
            "not lower",
            "Cross-entropy suits an ordinary model, and its probe, better than the square loss on "
            "this set.",
        )
        claim(
            f"{images}: TAFT-1, square loss, is more accurate than a probe, cross-entropy",
            square["taft-1"],
            entropy[accuracy.PROBE],
            "higher",
            "The probe itself gains from cross-entropy here what the last block gains from the "
            "square loss.",
        )
        claim(
            f"{images}: TAFT-1 is more accurate than the probe it starts from",
            square["taft-1"],
            square[accuracy.PROBE],
            "higher",
            "A thousand images leave little to be learned in the last block that the "
            "classifier has not learned already.",
        )
        claim(
            f"{images}: TAFT-1 gains from the square loss, against cross-entropy",
            square["taft-1"],
            entropy["taft-1"],
            "higher",
            "The paper's gain from the rescaled square loss was on finer-grained sets.",
        )
        claim(
            f"{images}: TAFT-3 is not less accurate than NLFT-3",
            square["taft-3"],
            square["nlft-3"],
            "not lower",
            "Three blocks are further from their first-order expansion than one.",
        )
        claim(
            f"{images}: TAFT-3 is more accurate than TAFT-1",
            square["taft-3"],
            square["taft-1"],
            "higher",
            "It trained for fewer passes here, with more to learn from as many images.",
        )
        claim(
            f"{images}: the exact optimum is not less accurate than TAFT-1 by gradient steps",
            square["taft-1-exact"],
            square["taft-1"],
            "not lower",
            "",
        )
        claim(
            f"{images}: low-rank TAFT is not less accurate than TAFT-1",
            square["taft-1-low-rank"],
            square["taft-1"],
            "not lower",
            "The factor that is fixed was drawn at random.",
        )
    return claims
