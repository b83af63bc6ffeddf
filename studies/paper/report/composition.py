"""The page's part on composition: accuracy against the number of shards, in either deal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from studies.paper.cells import Found
from studies.paper.outcomes import right
from studies.paper.parts import composition, soups
from studies.paper.report.claims import Claim
from studies.paper.report.section import Section
from studies.paper.report.series import draw_series
from studies.paper.report.summary import Mean, gain, listed, spread
from tangent_ops import pictures
from tangent_ops.pictures import Look

JOINT = {
    "sgd": "TAFT-1 of all images, SGD",
    "exact": "TAFT-1 of all images, exact",
    "statistics": "statistics, any number of shards",
}
WAYS = {
    "sgd mean": "mean of SGD's shards",
    "exact mean": "mean of exact shards",
    "factor": "mean times a factor",
    "public mean": "mean, public curvature",
    "weights": "least-squares weights",
    "head": "mean, public curvature, head by statistics",
    "head, a round": "the same, the head in one more round",
    "lossless, 3 rounds": "lossless, stopped after 3 rounds",
    "lossless, 8 rounds": "lossless, stopped after 8 rounds",
}
SOUPS = {
    "soup": "NLFT-1: soup",
    "task arithmetic": "NLFT-1: task arithmetic",
    "TIES": "NLFT-1: TIES",
    "ensemble": "NLFT-1: ensemble of outputs",
}
LOOKS = {
    "sgd mean": Look("mean of SGD's shards", "D", "-", pictures.TANGENT),
    "exact mean": Look("mean of exact shards", "P", "--", pictures.TANGENT_OTHER),
    "public mean": Look("mean, public curvature", "^", "-", pictures.EXACT),
    "ensemble": Look("NLFT-1 ensemble", "o", ":", pictures.ORDINARY_OTHER),
    "soup": Look("NLFT-1 soup", "s", "--", pictures.ORDINARY),
}
LEVELS = (
    ("exact", "exact fit of all images", (0, (1, 2))),
    ("statistics", "statistics, any number of shards", (0, (6, 2))),
)
CURVATURE = (
    "Public curvature: the anchor's public images take part in each shard's fit, in its curvature "
    "alone ([`with_public`](../promises/composition.md)). Their classes are not used, and there is "
    "no further round."
)
ROUND = "head, a round"
MEANS = {  # of exact fits
    "exact mean": "of exact shards",
    "factor": "times a validated factor",
    "public mean": "with public curvature",
    "head": "with public curvature and the head by statistics",
    ROUND: "with the head in one more round",
}
SHOWN = ("exact mean", "public mean", ROUND)
DEALS = {"iid": "at random", "by class": "by class"}
AT = 10  # shards that the claims are about
MEANS_AIM, STATISTICS_AIM = 3.0, 1.0  # points below joint training


def scores(found: Found, images: str, deal: str, way: str, shards: int) -> np.ndarray | None:
    """(S, I): which test images were right, by seed; None if that was not run."""
    if way in SOUPS:
        asked = {"images": images, "deal": deal, "shards": shards}
        cells = found.of(soups.PART, **asked)
        rows = [(cell["seed"], row) for cell in cells for row in cell["rows"] if row["way"] == way]
    else:
        cells = found.of(composition.PART, images=images)
        rows = [
            (cell["seed"], row)
            for cell in cells
            for row in cell["rows"]
            if (row["deal"], row["way"], row["shards"]) == (deal, way, shards)
        ]
    ordered = sorted(rows, key=lambda entry: entry[0])
    return np.stack([right(row["test"]) for _, row in ordered]) if rows else None


def section(found: Found, out: Path) -> Section:
    """All of it."""
    sets = list(dict.fromkeys(cell["images"] for cell in found.of(composition.PART)))
    tables = "\n\n".join(_table(found, images) for images in sets)
    figure = _draw(found, sets, out / "composition.png")
    return Section(
        "Composition",
        [_means(found, sets), _sums(found, sets), _by_class(found, sets), _soups(found, sets)],
        f"{CURVATURE}\n\n{tables}\n\n{_costs(found, sets[0])}",
        [(figure, "Shards composed, against their number, in either deal")],
        [claim for images in sets for claim in _claims(found, images)],
    )


def numbers(found: Found, images: str) -> list[int]:
    """Of shards, ascending."""
    cells = found.of(composition.PART, images=images)
    return sorted({count for cell in cells for count in cell["shards"]})


def _count(found: Found, images: str) -> int:
    """The number of shards that sentences and claims are about."""
    run = numbers(found, images)
    return AT if AT in run else run[-1]


def _lead(found: Found, images: str, first: str, second: str, deal: str = "iid") -> Mean | None:
    """Of one way over another, each joint (of all images) or of shards."""
    pair = []
    for way in (first, second):
        joint = way in JOINT
        shards = 1 if joint else _count(found, images)
        pair.append(scores(found, images, "joint" if joint else deal, way, shards))
    return None if pair[0] is None or pair[1] is None else gain(pair[0], pair[1])


def _leads(
    found: Found, sets: list[str], first: str, second: str, deal: str = "iid"
) -> dict[str, Mean]:
    every = {images: _lead(found, images, first, second, deal) for images in sets}
    return {images: lead for images, lead in every.items() if lead is not None}


def _means(found: Found, sets: list[str]) -> str:
    """What was aimed at first: each mean against the joint training of its kind."""
    every = {"sgd mean": _leads(found, sets, "sgd mean", "sgd")}
    every |= {way: _leads(found, sets, way, "exact") for way in MEANS}
    near = {
        way: sum(100 * lead.value >= -MEANS_AIM for lead in leads.values())
        for way, leads in every.items()
    }
    titles = {"sgd mean": "of SGD's shards", **MEANS}
    counts = ", ".join(f"{titles[way]} {near[way]}" for way in every)
    lost = "; ".join(f"{MEANS[way]} {listed(every[way])}" for way in SHOWN)
    reached = max(n for way, n in near.items() if way != ROUND) == len(sets)
    return (
        f"{'Reached' if reached else 'Missed'}: in one pass, the mean should lose at most "
        f"{MEANS_AIM:g} points of joint training at {_count(found, sets[0])} random shards, on "
        f"every set. Number of sets, of {len(sets)}, on which a mean does: {counts}. What it "
        f"loses: {lost}."
    )


def _sums(found: Found, sets: list[str]) -> str:
    statistics = _leads(found, sets, "statistics", "exact")
    return (
        "Reached: statistics are the same bits for every number of shards in either deal, so they "
        "lose nothing of a joint fit of their parameters (aim: at most "
        f"{STATISTICS_AIM:g} point). Of the exact joint fit of all parameters they lose: "
        f"{listed(statistics)}."
    )


def _by_class(found: Found, sets: list[str]) -> str:
    ways = ("exact mean", "weights", "public mean", "head", "head, a round", "lossless, 8 rounds")
    leads = {way: _leads(found, sets, way, "exact", "by class") for way in ways}
    shown = {way: spread(each.values()) for way, each in leads.items()}
    return (
        f"Dealt by class, against the exact joint fit: the mean of exact shards {shown[ways[0]]} "
        f"points, with least-squares weights {shown[ways[1]]}, with public curvature "
        f"{shown[ways[2]]}, and with the head by statistics, too, {shown[ways[3]]}; with that in "
        f"one more round {shown[ways[4]]}, lossless after 8 rounds {shown[ways[5]]}."
    )


def _soups(found: Found, sets: list[str]) -> str:
    """Ours that needs one pass against theirs."""
    shown = {way: spread(_leads(found, sets, "factor", way).values()) for way in SOUPS}
    return (
        "At random, the mean of exact shards times a factor, which is one pass, against ordinary "
        f"models: soup {shown['soup']} points, task arithmetic {shown['task arithmetic']}, TIES "
        f"{shown['TIES']}, ensemble (a pass to each shard) {shown['ensemble']}."
    )


def _table(found: Found, images: str) -> str:
    cells = found.of(composition.PART, images=images)
    counts = numbers(found, images)
    rows = ["| deal | way | 1 | " + " | ".join(map(str, counts)) + " |"]
    rows.append("| --- " * (3 + len(counts)) + "|")
    for way, title in JOINT.items():
        values = scores(found, images, "joint", way, 1)
        if values is not None:
            shown = Mean.crossed(values).percent()
            same = [shown if way == "statistics" else "" for _ in counts]
            rows.append(f"| | {title} | {shown} | {' | '.join(same)} |")
    for deal, words in DEALS.items():
        for way, title in (WAYS | SOUPS).items():
            every = [scores(found, images, deal, way, count) for count in counts]
            if any(values is not None for values in every):
                shown = ["–" if v is None else Mean.crossed(v).percent() for v in every]
                rows.append(f"| {words} | {title} | | {' | '.join(shown)} |")
    anchor = Mean.crossed(np.stack([right(cell["anchor"]) for cell in cells])).percent()
    return (
        f"{images}: {cells[0]['train']} private images; test accuracy, %, against the number of "
        f"shards. The anchor, a probe of {cells[0]['public']} public images: {anchor}.\n\n"
        + "\n".join(rows)
    )


def _costs(found: Found, images: str) -> str:
    cells = found.of(composition.PART, images=images)
    count, first = _count(found, images), cells[0]
    delta, sums = (first[f"{name}_bytes"] / 1e6 for name in ("delta", "statistics"))

    def seconds(way: str) -> str:
        asked = found.of(soups.PART, images=images, shards=count, deal="iid")
        source = asked if way in SOUPS else cells
        joint = way in JOINT
        values = [
            row["seconds"]
            for cell in source
            for row in cell["rows"]
            if row["way"] == way
            and (way in SOUPS or row["shards"] == (1 if joint else count))
            and row.get("deal", "iid") in ("iid", "joint")
        ]
        return f"{Mean.of(values).value:.1f}" if values else "–"

    kept = {
        "statistics": f"{sums:.1f} a shard",
        "exact mean": f"{delta:.1f} a shard",
        "public mean": f"{delta:.1f} a shard",
        "weights": f"{delta:.1f} a shard",
        "head": f"{delta:.1f} a shard, and its sums",
        "head, a round": f"{delta:.1f} a shard, and its sums",
        "lossless, 3 rounds": f"{delta:.1f} a shard, and its data or factors",
        "lossless, 8 rounds": f"{delta:.1f} a shard, and its data or factors",
        "soup": f"{delta:.1f} a shard",
        "TIES": f"{delta:.1f} a shard",
        "ensemble": f"{delta:.1f} a shard",
    }
    titles = JOINT | WAYS | SOUPS
    head = ("way", "test accuracy, %", "MB kept to compose again", "seconds", "passes of an image")
    rows = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for way, words in kept.items():
        ordinary = "1" if way in ("soup", "TIES") else str(count)
        passes = ordinary if way in SOUPS else "1 dual"
        joint = way in JOINT
        values = scores(found, images, "joint" if joint else "iid", way, 1 if joint else count)
        shown = "–" if values is None else Mean.crossed(values).percent()
        rows.append(f"| {titles[way]} | {shown} | {words} | {seconds(way)} | {passes} |")
    return (
        f"What composing {count} random shards of {images} costs once they are trained: seconds "
        "for the composition, for statistics with their sums, and what stays in store so that a "
        "shard can be taken out. A dual pass takes up to three times a plain one's operations.\n\n"
        + "\n".join(rows)
    )


@pictures.styled()
def _draw(found: Found, sets: list[str], path: Path) -> Path:
    figure = pictures.new_figure(height=2.2 + 2.4 * len(sets))
    panels = figure.subplots(len(sets), 2, sharey="row", squeeze=False)
    for row, images in zip(panels, sets, strict=True):
        counts = numbers(found, images)
        for axes, (deal, words) in zip(row, DEALS.items(), strict=True):
            for way, look in LOOKS.items():
                values = {n: scores(found, images, deal, way, n) for n in counts}
                run = {n: Mean.crossed(v) for n, v in values.items() if v is not None}
                if run:
                    draw_series(axes, look, list(run), run.values())
            for way, name, line in LEVELS:
                values = scores(found, images, "joint", way, 1)
                if values is not None:
                    pictures.draw_level(axes, 100 * float(values.mean()), name, line=line)
            pictures.number_axis(axes, counts)
            axes.set_title(f"{images}, {words}")
        row[0].set_ylabel("test accuracy, %")
    for axes in panels[-1]:
        axes.set_xlabel("shards")
    pictures.legend_above(figure, columns=3)
    words = "Bars: standard errors over seeds and test images."
    pictures.note(figure, f"{pictures.TERMS} {words}")
    return pictures.save(figure, path)


def _claims(found: Found, images: str) -> list[Claim]:
    claims = []
    count = _count(found, images)
    asked: tuple[tuple[str, str, str, str, Any], ...] = (
        ("iid", "the mean times a factor", "factor", "TIES", "not lower"),
        ("iid", "the mean times a factor", "factor", "ensemble", "not lower"),
        ("iid", "the mean with public curvature", "public mean", "exact mean", "higher"),
        ("by class", "the mean with public curvature", "public mean", "exact mean", "higher"),
        ("iid", "the mean's head in a round", "head, a round", "exact", "not lower"),
        ("by class", "the mean's head in a round", "head, a round", "ensemble", "higher"),
        ("by class", "lossless after 8 rounds", "lossless, 8 rounds", "exact", "not lower"),
        ("iid", "statistics", "statistics", "exact", "not lower"),
    )
    titles = {"exact": "TAFT-1 of all images, exact", "exact mean": "the mean of exact shards"}
    titles |= {"TIES": "TIES of NLFTs", "ensemble": "an ensemble of NLFTs"}
    for deal, text, first, second, wanted in asked:
        lead = _lead(found, images, first, second, deal)
        if lead is not None:
            be = "are" if text == "statistics" else "is"
            is_ = f"{be} {'more' if wanted == 'higher' else 'not less'} accurate than"
            name = f"{images}, {count} shards {DEALS[deal]}: {text}"
            claims.append(Claim(f"{name} {is_} {titles[second]}", lead, wanted))
    return claims
