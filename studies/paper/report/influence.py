"""The page's part on influence: whether it is exact, and what taking out harmful images does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from studies.paper.cells import Found
from studies.paper.outcomes import right
from studies.paper.parts import influence
from studies.paper.report.claims import FAILS, HOLDS, Claim, held
from studies.paper.report.section import Section
from studies.paper.report.series import draw_series
from studies.paper.report.summary import Mean, gain, paired
from tangent_ops import pictures
from tangent_ops.pictures import Look

CHOSEN = 1.0  # the part of l2 that is all of it
EXACT_ERROR = 1e-3  # of the largest influence: what counts as exact
LOOKS = {
    "exact": Look("exact influence", "D", "-", pictures.EXACT),
    "classical": Look("classical influence", "^", "--", pictures.RIVAL),
    "left out": Look("loss when left out", "s", "-", pictures.TANGENT),
    "self-influence": Look("self-influence", "v", "--", pictures.TANGENT_OTHER),
    "training loss": Look("training loss", "P", "-.", pictures.ORDINARY),
    "anchor": Look("anchor's loss", "X", ":", pictures.PROBE),
    "random": Look("at random", "o", ":", pictures.LEVEL),
}


@dataclass(frozen=True)
class Set:
    """The cells of one set of images, by seed."""

    name: str
    cells: list[dict[str, Any]]

    @property
    def parts(self) -> list[float]:
        """Of l2, the strongest first."""
        return [strength["part"] for strength in self.cells[0]["strengths"]]

    @property
    def counts(self) -> list[int]:
        """How many images are taken out."""
        return [point["count"] for point in self.cells[0]["strengths"][0]["curves"]]

    @property
    def count(self) -> int:
        """Of them, the one that is nearest to how many have a wrong class."""
        return min(self.counts, key=lambda count: abs(count - self.cells[0]["wrong_classes"]))

    def at(self, part: float) -> list[dict[str, Any]]:
        """What each seed found at a part of l2."""
        place = self.parts.index(part)
        return [cell["strengths"][place] for cell in self.cells]

    def each(self, part: float, of: Callable[[dict[str, Any]], float]) -> list[float]:
        return [of(strength) for strength in self.at(part)]

    def mean(self, part: float, of: Callable[[dict[str, Any]], float]) -> Mean:
        return Mean.of(self.each(part, of))

    def auc(self, part: float, score: str) -> list[float]:
        return self.each(part, lambda strength: strength["auc"][score])

    def points(self, part: float, way: str, count: int) -> list[dict[str, Any]]:
        """The fits without that many images; without none, every way's are the same."""
        if count == 0:
            return [strength["whole"] for strength in self.at(part)]
        place = self.counts.index(count)
        return [strength["curves"][place][way] for strength in self.at(part)]

    def tested(self, part: float, way: str, count: int) -> np.ndarray:
        """Whether each test image is right, (S, I)."""
        return np.stack([right(point["test"]) for point in self.points(part, way, count)])

    def loss(self, part: float, way: str, count: int, *, key: str) -> str:
        """The mean of seeds, of "validation_loss" or "test_loss"."""
        return _number(Mean.of([point[key] for point in self.points(part, way, count)]))

    def gained(self, part: float, way: str) -> Mean:
        """Test accuracy by taking `count` images out."""
        return gain(self.tested(part, way, self.count), self.tested(part, way, 0))

    def lowered(self, part: float) -> list[float]:
        """By how much the validation loss falls without `count` images by exact influence."""
        pairs = zip(
            self.points(part, "exact", 0), self.points(part, "exact", self.count), strict=True
        )
        return [before["validation_loss"] - after["validation_loss"] for before, after in pairs]

    def summed(self, part: float, name: str) -> list[float]:
        """What the sum of the single influences of the same images says."""
        place = self.counts.index(self.count)
        return self.each(part, lambda found: found["curves"][place]["sum_of_single"][name])


def section(found: Found, out: Path) -> Section:
    """All of it."""
    cells = sorted(found.of(influence.PART), key=lambda cell: cell["seed"])
    names = list(dict.fromkeys(cell["images"] for cell in cells))
    sets = [Set(name, [cell for cell in cells if cell["images"] == name]) for name in names]
    figures = [
        (_draw_curves(sets, out / "influence.png"), "Images taken out, and the test accuracy"),
        (_draw_strengths(sets, out / "influence-l2.png"), "From strong to hardly any l2"),
    ]
    text = "\n\n".join([_setting(sets[0]), *(_tables(each) for each in sets)])
    claims = [claim for each in sets for claim in _claims(each)]
    verdicts = {claim.text: claim.verdict for claim in held(claims)}
    return Section("Influence", _findings(sets, verdicts), text, figures, claims)


def _findings(sets: list[Set], verdicts: dict[str, str]) -> list[str]:
    """What came of each aim."""
    findings = [_removal(sets, verdicts), _detection(sets, verdicts), _exactness(sets)]
    return [f"{'Reached' if met else 'Missed'}: {words}" for met, words in findings]


def _exactness(sets: list[Set]) -> tuple[bool, str]:
    error = max(f["exact_error"] for each in sets for part in each.parts for f in each.at(part))
    shown = []
    for each in sets:
        first, last = (
            each.mean(part, lambda f: f["agreement"]).value for part in (CHOSEN, each.parts[-1])
        )
        shown.append(f"{each.name} {first:.2f} and {last:.2f}")
    weakest = _fraction(sets[0].parts[-1])
    return error < EXACT_ERROR, (
        "exact influence should be what leaving an image out and fitting again does; the largest "
        f"error is {error:.0e} of the largest influence. The classical one correlates with it, at "
        f"the chosen l2 and at {weakest} of it: {', '.join(shown)}."
    )


def _removal(sets: list[Set], verdicts: dict[str, str]) -> tuple[bool, str]:
    shown, met = [], True
    for each in sets:
        parts = (CHOSEN, each.parts[-1])
        found = [verdicts[_better(each, part, "classical").text] for part in parts]
        met &= HOLDS in found and FAILS not in found
        for part in parts:
            gains = [each.gained(part, way).points() for way in ("exact", "classical", "random")]
            shown.append(f"{each.name} at {_strength(part)} {', '.join(gains)}")
    return met, (
        "exact influence should choose better than the classical one what to take out, at one l2 "
        f"at least, on every set. Test accuracy without the {sets[0].count} worst of "
        f"{sets[0].cells[0]['train']} images by exact, by classical, at random: {'; '.join(shown)}."
    )


def _detection(sets: list[Set], verdicts: dict[str, str]) -> tuple[bool, str]:
    shown, met = [], True
    for each in sets:
        last = each.parts[-1]
        aims = [_finds_better(each, CHOSEN, "anchor"), _finds_better(each, last, "training loss")]
        met &= all(verdicts[aim.text] == HOLDS for aim in aims)
        for part, other in ((CHOSEN, "anchor"), (last, "training loss")):
            area = {score: Mean.of(each.auc(part, score)).value for score in LOOKS}
            shown.append(
                f"{each.name} at {_strength(part)} {area['left out']:.2f} against "
                f"{area[other]:.2f} ({other}), {area['exact']:.2f} (exact harm)"
            )
    return met, (
        "wrong classes should be found better by the loss of an image that is left out than by the "
        "anchor's loss at the chosen l2, and than by the training loss at the weakest. AUC: "
        f"{'; '.join(shown)}."
    )


def _setting(each: Set) -> str:
    first = each.cells[0]
    seconds = Mean.of([f["influence_seconds"] for f in each.at(CHOSEN)]).value
    return (
        f"TAFT-1, fitted exactly to {first['train']} training images, {first['wrong_classes']} of "
        f"them with a wrong class; the anchor's classifier is a probe of {first['public']} other "
        "images with right classes. Leave-one-out cross-validation chooses l2; then everything is "
        "done at parts of it. Harm is by how much the mean loss of "
        f"{first['validation']} validation images falls without an image (exact: all images in "
        f"{seconds:.1f} s). The truth: {first['checked']} images for each seed and l2, left out "
        "one by one, and the others fitted by a direct solve."
    )


def _tables(each: Set) -> str:
    count = each.count
    rows = [
        f"**{each.name}.** Classical and exact influence of all images; {count} images taken out "
        "at once by exact influence, and what the sum of their single influences says.",
        _table(
            [
                *("l2", "training loss", "loss when left out", "classical and exact: correlation"),
                *("validation loss falls by", "exact sum", "classical sum"),
            ],
            [
                [
                    _strength(part),
                    _number(each.mean(part, lambda f: f["training_loss"])),
                    _number(each.mean(part, lambda f: f["left_out_loss"])),
                    _number(each.mean(part, lambda f: f["agreement"])),
                    _number(Mean.of(each.lowered(part))),
                    _number(Mean.of(each.summed(part, "exact"))),
                    _number(Mean.of(each.summed(part, "classical"))),
                ]
                for part in each.parts
            ],
        ),
        f"Test accuracy, %, before and after {count} images are taken out.",
        _by_ways(each, lambda *point: Mean.crossed(each.tested(*point)).percent()),
        *(
            f"The same, {title}.\n\n{_by_ways(each, partial(each.loss, key=key))}"
            for key, title in (("validation_loss", "validation loss"), ("test_loss", "test loss"))
        ),
        "Wrong classes found: area under the ROC curve, %.",
        _table(
            ["l2", *(look.title for look in LOOKS.values())],
            [
                [_strength(part), *(Mean.of(each.auc(part, score)).percent() for score in LOOKS)]
                for part in each.parts
            ],
        ),
    ]
    return "\n\n".join(rows)


def _by_ways(each: Set, shown: Callable[[float, str, int], str]) -> str:
    """A row to each l2: with all images, and without `count` of them by each way."""
    return _table(
        ["l2", "all images", *(LOOKS[way].title for way in influence.WAYS)],
        [
            [
                _strength(part),
                shown(part, "exact", 0),
                *(shown(part, way, each.count) for way in influence.WAYS),
            ]
            for part in each.parts
        ],
    )


def _claims(each: Set) -> list[Claim]:
    last = each.parts[-1]
    return [
        Claim(
            f"{each.name}: classical influence correlates less with the exact one at "
            f"{_strength(last)} than at the chosen one",
            paired(*(each.each(part, lambda f: f["agreement"]) for part in (CHOSEN, last))),
            "higher",
            percent=False,
        ),
        *(
            _better(each, part, other)
            for other in ("random", "classical")
            for part in (CHOSEN, last)
        ),
        _finds_better(each, CHOSEN, "anchor"),
        _finds_better(each, last, "training loss"),
    ]


def _finds_better(each: Set, part: float, other: str) -> Claim:
    return Claim(
        f"{each.name}, {_strength(part)}: wrong classes are found better by the loss when left "
        f"out than by the {LOOKS[other].title} (AUC)",
        paired(each.auc(part, "left out"), each.auc(part, other)),
        "higher",
    )


def _better(each: Set, part: float, other: str) -> Claim:
    by = {"random": "at random", "classical": "by the classical one"}[other]
    return Claim(
        f"{each.name}, {_strength(part)}: test accuracy is higher after {each.count} images are "
        f"taken out by exact influence than {by}",
        gain(each.tested(part, "exact", each.count), each.tested(part, other, each.count)),
        "higher",
    )


@pictures.styled()
def _draw_curves(sets: list[Set], path: Path) -> Path:
    figure = pictures.new_figure(height=1 + 3 * len(sets))
    grid = figure.subplots(len(sets), 2, sharey="row", squeeze=False)
    for row, each in zip(grid, sets, strict=True):
        for axes, part in zip(row, (CHOSEN, each.parts[-1]), strict=True):
            pictures.draw_level(axes, 0)
            for number, way in enumerate(influence.WAYS):
                before = each.tested(part, way, 0)
                gains = [gain(each.tested(part, way, count), before) for count in each.counts]
                apart = [count * (1 + 0.02 * (number - 2)) for count in each.counts]
                draw_series(axes, LOOKS[way], apart, gains)
            pictures.number_axis(axes, each.counts)
            axes.set_title(f"{each.name}, {_strength(part)}")
        row[0].set_ylabel("change, points")
    for axes in grid[-1]:
        axes.set_xlabel("training images taken out")
    pictures.legend_above(figure, columns=5)
    pictures.note(
        figure,
        "Change of test accuracy. Bars: standard errors over seeds and test images. Points are "
        "set apart sideways.",
    )
    return pictures.save(figure, path)


@pictures.styled()
def _draw_strengths(sets: list[Set], path: Path) -> Path:
    figure = pictures.new_figure(height=1 + 3 * len(sets))
    grid = figure.subplots(len(sets), 2, squeeze=False)
    for (left, right_), each in zip(grid, sets, strict=True):
        parts = each.parts[::-1]
        exact = [each.mean(part, lambda f: f["correlation"]["exact"]) for part in parts]
        draw_series(left, LOOKS["exact"], parts, exact, factor=1)
        classical = [each.mean(part, lambda f: f["agreement"]) for part in parts]
        draw_series(left, LOOKS["classical"], parts, classical, factor=1)
        for name in LOOKS:
            means = [Mean.of(each.auc(part, name)) for part in parts]
            draw_series(right_, LOOKS[name], parts, means)
        left.set_title(f"{each.name}: influence")
        left.set_ylabel("correlation")
        right_.set_title(f"{each.name}: wrong classes found")
        right_.set_ylabel("area under ROC curve, %")
        for axes in (left, right_):
            pictures.number_axis(axes, parts)
    for axes in grid[-1]:
        axes.set_xlabel("part of the chosen l2")
    pictures.legend_above(figure, columns=4)
    pictures.note(
        figure,
        "Correlations: exact influence with the true one, of images left out and the others fitted "
        "again; classical with exact influence, of all images. Bars: standard errors over seeds.",
    )
    return pictures.save(figure, path)


def _strength(part: float) -> str:
    if part == CHOSEN:
        return "the chosen l2"
    return f"{_fraction(part)} of l2" if part < 1 else f"{part:g} times l2"


def _fraction(part: float) -> str:
    return f"1/{1 / part:,.0f}"


def _number(mean: Mean) -> str:
    return f"{mean.value:.2f} ± {mean.error:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
