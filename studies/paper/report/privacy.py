"""The page's part on privacy: accuracy against ε."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studies.paper.cells import Found
from studies.paper.outcomes import right
from studies.paper.parts import privacy
from studies.paper.parts.private_subspace import (
    DESCENT,
    DESCENT_HEAD,
    PUBLIC,
    STATISTICS,
    STATISTICS_HEAD,
)
from studies.paper.report.claims import HOLDS, Claim
from studies.paper.report.section import Section
from studies.paper.report.series import draw_series
from studies.paper.report.summary import Mean, gain, listed
from tangent_ops import pictures
from tangent_ops.pictures import Look

LOOKS = {
    "tangent": Look("TAFT-1", "D", "-", pictures.TANGENT),
    "ordinary": Look("NLFT-1 (Opacus)", "s", "--", pictures.ORDINARY),
    "probe": Look("linear probe", "o", ":", pictures.PROBE),
}
BEST, BEST_PROBE = "best tangent", "best probe"
WAYS = {
    BEST: Look("best tangent way", "D", "-", pictures.TANGENT),
    BEST_PROBE: Look("best probe", "o", "-", pictures.PROBE),
    DESCENT: Look("noisy descent, core and head", "^", "--", pictures.TANGENT_OTHER),
    DESCENT_HEAD: Look("noisy descent, head: probe in public subspace", "v", "--", pictures.PROBE),
    STATISTICS: Look("noisy statistics, core and head", "P", "-.", pictures.EXACT),
    STATISTICS_HEAD: Look("noisy statistics, head", "X", "-.", pictures.RIVAL),
    privacy.PROBE: Look("probe, DP-SGD", "o", ":", pictures.PROBE),
    privacy.TANGENT: Look("TAFT-1, DP-SGD", "s", ":", pictures.TANGENT),
    privacy.TANGENT_CORE: Look("TAFT-1 in the core, DP-SGD", "d", ":", pictures.TANGENT),
    privacy.ORDINARY: Look("NLFT-1, DP-SGD (Opacus)", "s", "--", pictures.ORDINARY),
    privacy.ORDINARY_CORE: Look(
        "NLFT-1 in the core, DP-SGD (Opacus)", "d", "--", pictures.ORDINARY_OTHER
    ),
}
DRAWN = (BEST, BEST_PROBE, privacy.PROBE, privacy.TANGENT, privacy.ORDINARY)
OURS = (DESCENT, STATISTICS)
PROBES = (DESCENT_HEAD, STATISTICS_HEAD, privacy.PROBE)


@dataclass(frozen=True)
class Scores:
    """Of one set, seeds (S) by test images (I).

    Attributes:
        images: The set.
        cells: Of it, with arguments.
        tested: (way, ε) -> (S, I); ε is None without noise.
        seconds: (way, ε) -> mean seconds of the chosen training.
    """

    images: str
    cells: list[dict[str, Any]]
    tested: dict[tuple[str, float | None], np.ndarray]
    seconds: dict[tuple[str, float | None], float]

    @classmethod
    def of(cls, found: Found, images: str) -> Scores:
        """From the cells; the best of several ways is chosen on validation images, by seed."""
        cells = found.of(privacy.PART, images=images)
        runs: dict[tuple[str, float | None], dict[int, dict[str, Any]]] = {}
        for cell in cells:
            for way in cell["ways"]:
                runs.setdefault((way["way"], way["epsilon"]), {})[cell["seed"]] = way
        epsilons = {epsilon for way, epsilon in runs if way == DESCENT and epsilon is not None}
        for epsilon in epsilons:
            for best, ways in ((BEST, OURS), (BEST_PROBE, PROBES)):
                runs[best, epsilon] = {
                    seed: max((runs[way, epsilon][seed] for way in ways), key=_validation)
                    for seed in runs[DESCENT, epsilon]
                }
        tested = {
            key: np.stack([right(seeds[seed]["tested"]) for seed in sorted(seeds)])
            for key, seeds in runs.items()
        }
        seconds = {
            key: float(np.mean([run["seconds"] for run in seeds.values()]))
            for key, seeds in runs.items()
        }
        return cls(images, cells, tested, seconds)

    def epsilons(self, way: str = DESCENT) -> list[float]:
        """That a way was run with, ascending."""
        return sorted({e for name, e in self.tested if name == way and e is not None})

    def anchor(self) -> Mean:
        """Of the public probe."""
        own = sorted((c for c in self.cells if c["group"] == PUBLIC), key=lambda c: c["seed"])
        return Mean.crossed(np.stack([right(cell["anchor"]) for cell in own]))

    def less(self, first: str, second: str, epsilon: float | None) -> Mean:
        """Accuracy of a way less that of another; None is without noise."""
        return gain(self.tested[first, epsilon], self.tested[second, epsilon])


def _validation(run: dict[str, Any]) -> float:
    return run["validation"]


def section(found: Found, out: Path) -> Section:
    """All of it."""
    names = dict.fromkeys(cell["images"] for cell in found.of(privacy.PART))
    sets = [Scores.of(found, images) for images in names]
    aimed = [(one, e, one.less(BEST, BEST_PROBE, e)) for one in sets for e in one.epsilons()]
    claims = [
        Claim(
            f"{one.images}, ε = {epsilon:g}: the best tangent way is more accurate than the best "
            "probe",
            difference,
            "higher",
        )
        for one, epsilon, difference in aimed
    ]
    factors = [_factors(one) for one in sets]
    claims += [claim for of_set in factors for claim in of_set]
    figures = [
        (_draw(one, out / f"privacy-{one.images}.png"), f"{one.images}: accuracy against ε")
        for one in sets
    ]
    findings = [*map(_aim, sets), *_bought(sets, factors)]
    return Section("Privacy", findings, "\n\n".join(map(_text, sets)), figures, claims)


def _aim(one: Scores) -> str:
    """What was aimed at, and what came of it."""
    differences = {e: one.less(BEST, BEST_PROBE, e) for e in one.epsilons()}
    above = [e for e, d in differences.items() if Claim("", d, "higher").verdict == HOLDS]
    below = [e for e, d in differences.items() if d.value < 0]
    reached = not below and len(above) >= min(2, len(differences))
    shown = listed({f"ε = {epsilon:g}:": lead for epsilon, lead in differences.items()})
    return (
        f"{'Reached' if reached else 'Missed'} on {one.images}: our best private way should be "
        f"below the best private probe at no ε, and above it at two. It is below at {len(below)} "
        f"and above beyond chance at {len(above)} of {len(differences)} ({shown}). Without noise, "
        "core and head less the head alone: "
        f"{one.less(DESCENT, DESCENT_HEAD, None).points()}."
    )


# Of the two factors: what is claimed, a way, and what is subtracted from it.
CONVEXITY = (
    ("convexity, all weights: TAFT-1 less NLFT-1", privacy.TANGENT, privacy.ORDINARY),
    ("convexity, in the core: TAFT-1 less NLFT-1", privacy.TANGENT_CORE, privacy.ORDINARY_CORE),
)
SUBSPACE = (
    (
        "public subspace: core and head by noisy descent less TAFT-1 by DP-SGD",
        DESCENT,
        privacy.TANGENT,
    ),
    ("public subspace: probe by noisy descent less by DP-SGD", DESCENT_HEAD, privacy.PROBE),
)


def _factors(one: Scores) -> list[Claim]:
    """What convexity and what the public subspace buy, at the largest ε that all ways have."""
    epsilon = one.epsilons(privacy.TANGENT)[-1]
    return [
        Claim(f"{one.images}, ε = {epsilon:g}: {text}", one.less(way, other, epsilon), "higher")
        for text, way, other in (*CONVEXITY, *SUBSPACE)
    ]


def _bought(sets: Sequence[Scores], factors: Sequence[Sequence[Claim]]) -> list[str]:
    """What convexity buys, and what the public subspace does."""
    epsilon = sets[0].epsilons(privacy.TANGENT)[-1]

    def of(place: int) -> str:
        pairs = zip(sets, factors, strict=True)
        return listed({one.images: claims[place].difference for one, claims in pairs})

    anchors = ", ".join(one.anchor().percent() for one in sets)
    reached = ", ".join(
        Mean.crossed(one.tested[privacy.TANGENT, epsilon]).percent() for one in sets
    )
    return [
        f"Convexity: by DP-SGD at ε = {epsilon:g}, a tangent model less an ordinary one is "
        f"{of(0)} with all of the block's weights, and {of(1)} in the public core. Without a "
        f"private image a probe has {anchors} %, TAFT-1 so trained {reached} %.",
        f"The public subspace, at the same ε: noisy descent in it less DP-SGD without it is "
        f"{of(2)} for core and head, and {of(3)} for a probe.",
    ]


def _text(one: Scores) -> str:
    """A table of accuracies and one of seconds."""
    epsilons = one.epsilons()
    heads = [f"ε = {epsilon:g}" for epsilon in epsilons]
    rows = [f"| {one.images} | {' | '.join([*heads, 'seconds'])} |"]
    rows.append("| --- " * (2 + len(epsilons)) + "|")
    for way, look in WAYS.items():
        cells = [
            Mean.crossed(one.tested[way, e]).percent() if (way, e) in one.tested else "-"
            for e in epsilons
        ]
        seconds = f"{max(s for (name, _), s in one.seconds.items() if name == way):.1f}"
        rows.append(f"| {look.title} | {' | '.join([*cells, seconds])} |")
    given = next(cell for cell in one.cells if cell["group"] == PUBLIC)
    samples = sorted({cell["samples"] for cell in one.cells})
    gradients = given["expected"] * given["steps"]
    free = {way: Mean.crossed(one.tested[way, None]).percent() for way in (DESCENT, DESCENT_HEAD)}
    return (
        f"**{one.images}**: {_range(samples)} private images, {given['public']} public ones for "
        f"the anchor's classifier, which alone is right on {one.anchor().percent()} %, and "
        f"{given['validation']} public ones that every option was chosen on, for each seed, way "
        f"and ε; δ = {given['failure']:g}. Coordinates and bounds are from the public images of "
        "both kinds. Noisy descent chooses directions, the sum of its steps' rates, their number, "
        "the clips and the core's share of the budget, core and head from what the head alone "
        f"chose, by a mean over draws of the noise ({given['draws']}) of which none is released. "
        f"Without noise, with options chosen alike: {free[DESCENT]} % with core and head, "
        f"{free[DESCENT_HEAD]} % with the head alone. TAFT-1 "
        f"and NLFT-1, in the core or not, take {gradients:,} samples' gradients by DP-SGD; the "
        f"probe {privacy.PROBE_STEPS} steps of half of all images. The best of several ways is "
        "chosen on the validation images, too. Test accuracy, %; seconds of one training, at the "
        "slowest ε; those in public coordinates include reading all features once.\n\n"
        + "\n".join(rows)
    )


def _range(counts: Sequence[int]) -> str:
    first, last = counts[0], counts[-1]
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _draw(one: Scores, path: Path) -> Path:
    series = {
        WAYS[way]: {e: Mean.crossed(one.tested[way, e]) for e in one.epsilons(way)} for way in DRAWN
    }
    levels = {
        "public probe: no private image": one.anchor(),
        "core and head by descent, without noise": Mean.crossed(one.tested[DESCENT, None]),
    }
    failure = one.cells[0]["failure"]
    note = "Bars: standard errors over seeds and test images."
    return draw(one.epsilons(), series, levels, failure, path, note)


@pictures.styled()
def draw(
    epsilons: Sequence[float],
    series: Mapping[Look, Mapping[float, Mean]],
    levels: Mapping[str, Mean],
    failure: float,
    path: Path,
    note: str = "Bars: standard errors over seeds.",
) -> Path:
    """Accuracies against ε.

    Args:
        epsilons: Of the axis.
        series: Of a way, ε -> accuracy.
        levels: Accuracies without ε, at most two.
        failure: δ.
        path: Of the PNG.
        note: Below the picture.
    """
    figure = pictures.new_figure(height=4.2)
    axes = figure.subplots()
    ends = [
        (draw_series(axes, look, [*means], means.values()), look.title, look.colour)
        for look, means in series.items()
    ]
    for (words, mean), line in zip(levels.items(), ("-.", (0, (1, 2))), strict=True):
        pictures.draw_level(axes, 100 * mean.value, line=line)
        ends.append((100 * mean.value, words, pictures.LEVEL))
    pictures.number_axis(axes, epsilons)
    axes.set_xlabel(f"ε at δ = {failure:g}")
    axes.set_ylabel("test accuracy, %")
    pictures.note(figure, f"{pictures.TERMS} {note}")
    pictures.label_ends(axes, ends)
    return pictures.save(figure, path)
