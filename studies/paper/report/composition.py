"""The page's part on composition: accuracy against the number of shards, in either deal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from studies.paper.cells import Found
from studies.paper.parts import composition, forgetting
from studies.paper.report.claims import Claim
from studies.paper.report.section import Section
from studies.paper.report.series import draw_series
from studies.paper.report.summary import Mean, paired
from tangent_ops import pictures
from tangent_ops.pictures import Look

LOOKS = {
    ("tangent", "mean"): Look("TAFT, mean", "D", "-", pictures.TANGENT),
    ("tangent", "least_squares"): Look("TAFT, least squares", "^", "-", pictures.TANGENT_OTHER),
    ("ordinary", "soup"): Look("NLFT, soup", "s", "--", pictures.ORDINARY),
    ("ordinary", "ensemble"): Look("NLFT, output ensemble", "o", ":", pictures.ORDINARY_OTHER),
}
EXACT = {
    ("exact", "lossless"): Look("exact, lossless", "v", "-", pictures.EXACT),
    ("exact", "mean"): Look("exact, mean", "P", "--", pictures.EXACT),
}


def values(found: Found, images: str, deal: str, way: str, shards: int, key: str) -> list[float]:
    """Of every seed at the rate that was chosen; one shard is the same in either deal."""
    given: dict[str, Any] = {"images": images, "shards": shards, "deal": deal}
    if shards == 1:
        cells = found.of(composition.PART, images=images, way=way, shards=1)
        given["deal"] = cells[0]["deal"] if cells else deal
    best = composition.chosen(found, way=way, **given)
    if best is None:
        return []
    cells = found.of(composition.PART, way=way, rate=best["rate"], **given)
    return [cell[key] for cell in sorted(cells, key=lambda cell: cell["seed"])]


def numbers(found: Found, images: str, way: str, deal: str) -> list[int]:
    """Of shards, ascending."""
    cells = found.of(composition.PART, images=images, way=way)
    return sorted({cell["shards"] for cell in cells if cell["deal"] == deal or cell["shards"] == 1})


def section(found: Found, out: Path) -> Section:
    """All of it."""
    cells = found.of(composition.PART)
    sets = list(dict.fromkeys(cell["images"] for cell in cells))
    text, figures, claims = [_costs(found)], [], []
    for images in sets:
        deals = list(
            dict.fromkeys(c["deal"] for c in cells if c["images"] == images and c["shards"] > 1)
        )
        text.append(_table(found, images, deals))
        path = out / f"composition-{images}.png"
        caption = f"Shards of {images} composed: against their number, in either deal"
        figures.append((_draw(found, images, deals, path), caption))
        claims += _claims(found, images, deals)
    return Section("Composition", "\n\n".join(text), figures, claims)


def _costs(found: Found) -> str:
    measured = found.of(forgetting.PART)
    if not measured:
        return ""
    tangent, ordinary = (measured[0][f"{way}_image_flops"] / 1e6 for way in ("tangent", "ordinary"))
    return (
        "One shard is joint training. What a prediction costs beside the frozen blocks (their cost "
        f"is the same for all): a soup one pass, {ordinary:.1f} MFLOP; any composition of tangent "
        f"models one dual pass, {tangent:.1f} MFLOP; an output ensemble of K models K passes, "
        f"K times {ordinary:.1f} MFLOP, and K sets of weights in memory."
    )


def _table(found: Found, images: str, deals: list[str]) -> str:
    counts = numbers(found, images, "tangent", deals[0])
    rows = [f"| {images} | " + " | ".join(map(str, counts)) + " |"]
    rows.append("| --- " * (1 + len(counts)) + "|")
    for deal in deals:
        for (way, key), look in (LOOKS | EXACT).items():
            cells = [values(found, images, deal, way, count, key) for count in counts]
            if any(cells):
                shown = [Mean.of(cell).percent() if cell else "–" for cell in cells]
                rows.append(f"| {deal}: {look.title} | " + " | ".join(shown) + " |")
    sizes = {cell["way"]: cell["train"] for cell in found.of(composition.PART, images=images)}
    note = f"Test accuracy, %, against the number of shards; {sizes['tangent']} private images"
    if "exact" in sizes:
        note += f", for the exact fits {sizes['exact']} of them"
    return f"{note}.\n\n" + "\n".join(rows)


@pictures.styled()
def _draw(found: Found, images: str, deals: list[str], path: Path) -> Path:
    figure = pictures.new_figure(height=4.9)
    panels = figure.subplots(1, len(deals), sharey=True, squeeze=False)[0]
    for each, deal in zip(panels, deals, strict=True):
        for (way, key), look in (LOOKS | EXACT).items():
            counts = numbers(found, images, way, deal)
            points = [values(found, images, deal, way, count, key) for count in counts]
            if points:
                if way == "exact":  # of fewer images than the others
                    size = found.of(composition.PART, images=images, way=way)[0]["train"]
                    look = replace(look, title=f"{look.title} ({size} images)")
                draw_series(each, look, counts, [Mean.of(point) for point in points])
        anchors = [c["anchor"] for c in found.of(composition.PART, images=images, way="tangent")]
        pictures.draw_level(each, 100 * Mean.of(anchors).value, "the anchor")
        pictures.number_axis(each, numbers(found, images, "tangent", deal))
        each.set_xlabel("shards")
        each.set_title({"iid": "dealt at random", "by class": "dealt by class"}[deal])
    panels[0].set_ylabel("test accuracy, %")
    pictures.legend_above(figure, columns=3)
    pictures.note(figure, f"{pictures.TERMS} Bars: standard errors over seeds.")
    return pictures.save(figure, path)


def _claims(found: Found, images: str, deals: list[str]) -> list[Claim]:
    claims = []

    def claim(text: str, first: Any, second: Any, wanted: Any, why: str) -> None:
        if first and second:
            claims.append(Claim(f"{images}, {text}", paired(first, second), wanted, why))

    for deal in deals:
        counts = numbers(found, images, "tangent", deal)
        for count in [count for count in (10, 50) if count in counts]:
            got = {k: values(found, images, deal, k[0], count, k[1]) for k in LOOKS}
            name = f"{count} shards {'at random' if deal == 'iid' else 'by class'}"
            mean = got["tangent", "mean"]
            claim(
                f"{name}: the mean of TAFTs is not less accurate than a soup of NLFTs",
                mean,
                got["ordinary", "soup"],
                "not lower",
                "From one anchor and over few steps ordinary models stay close enough for their "
                "weights to be averaged.",
            )
            claim(
                f"{name}: the mean of TAFTs, one pass, is not less accurate than an ensemble",
                mean,
                got["ordinary", "ensemble"],
                "not lower",
                "The ensemble costs a pass for every shard.",
            )
            claim(
                f"{name}: least-squares weights are more accurate than the mean",
                got["tangent", "least_squares"],
                mean,
                "higher",
                "Shards dealt at random are alike, so equal weights are near the best."
                if deal == "iid"
                else "A weight scales all that a shard does; it cannot keep a shard of one class "
                "from calling everything that class. And weights fitted to few validation images "
                "carry their noise.",
            )
    joint = values(found, images, deals[0], "exact", 1, "lossless")
    for deal in deals:
        exact = numbers(found, images, "exact", deal)
        for largest in exact[1:][-1:]:
            name = f"{largest} shards {'at random' if deal == 'iid' else 'by class'}"
            lossless = values(found, images, deal, "exact", largest, "lossless")
            claim(
                f"{name}: the lossless composition is not less accurate than the joint exact fit",
                lossless,
                joint,
                "not lower",
                "Both are solved to a tolerance.",
            )
            claim(
                f"{name}: the lossless composition is more accurate than the mean of exact fits",
                lossless,
                values(found, images, deal, "exact", largest, "mean"),
                "higher",
                "With so few images the mean's stronger shrinkage costs little.",
            )
    return claims
