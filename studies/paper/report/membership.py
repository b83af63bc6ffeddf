"""The page's part on membership: what an attacker sees of images before and after forgetting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studies.paper.cells import Found
from studies.paper.outcomes import right
from studies.paper.parts import membership
from studies.paper.report.claims import Claim
from studies.paper.report.section import Section
from studies.paper.report.summary import Mean, auc, caught, paired
from tangent_ops import pictures

FALSE_POSITIVES = 0.05
BOOTSTRAPS = 500
COLOURS = {
    "tangent mean": pictures.TANGENT,
    "exact": pictures.TANGENT_OTHER,
    "statistics": pictures.EXACT,
    "ordinary": pictures.ORDINARY,
}
TITLES = {
    "tangent mean": "mean of TAFTs",
    "exact": "TAFT, exact",
    "statistics": "statistics",
    "ordinary": "NLFT of all",
}
AGAIN = "ordinary, trained again without it"
FORGOTTEN = (
    "tangent mean, forgotten by the ledger",
    "statistics, forgotten by subtraction",
    "exact, forgotten with a certificate",
)
APPROXIMATE = ("ordinary, ascent", "ordinary, fine-tuning on the rest")

Runs = Sequence[tuple[Sequence[float], Sequence[float]]]
Attacked = dict[str, list[dict[str, Any]]]  # model -> what a cell has of it, for each seed


@dataclass(frozen=True)
class Attack:
    """How well members are told from others: a mean over seeds, and its 95 % interval."""

    auc: float
    auc_interval: tuple[float, float]
    caught: float
    caught_interval: tuple[float, float]

    @property
    def sees(self) -> bool:
        """Whether the whole interval of the area is above chance."""
        return self.auc_interval[0] > 0.5

    def told(self) -> str:
        """As "AUC 0.71 (0.65 to 0.77)"."""
        return f"AUC {self.auc:.2f} ({self.auc_interval[0]:.2f} to {self.auc_interval[1]:.2f})"


def attack(runs: Runs, rate: float = FALSE_POSITIVES) -> Attack:
    """Of the seeds' scores of members and of others; the interval is a bootstrap's.

    Seeds are drawn, and of each the members and the others: it is of other seeds and candidates.

    Args:
        runs: Of each seed, the scores of members and of others.
        rate: Of false positives, at which true ones are counted.
    """
    random = np.random.default_rng(0)
    arrays = [(np.asarray(members), np.asarray(others)) for members, others in runs]

    def seen(several: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
        found = [
            (auc(members, others), caught(members, others, rate)) for members, others in several
        ]
        area, share = np.mean(found, axis=0)
        return float(area), float(share)

    def drawn() -> list[tuple[np.ndarray, np.ndarray]]:
        seeds = random.integers(len(arrays), size=len(arrays))
        pairs = (arrays[seed] for seed in seeds)
        return [(random.choice(a, len(a)), random.choice(b, len(b))) for a, b in pairs]

    again = np.array([seen(drawn()) for _ in range(BOOTSTRAPS)])
    (low, caught_low), (high, caught_high) = np.quantile(again, [0.025, 0.975], axis=0)
    area, share = seen(arrays)
    return Attack(area, (float(low), float(high)), share, (float(caught_low), float(caught_high)))


def section(found: Found, out: Path) -> Section:
    """All of it."""
    cells = sorted(found.of(membership.PART), key=lambda cell: cell["seed"])
    runs: Attacked = {}
    for cell in cells:
        for name, seen in cell["attacked"].items():
            runs.setdefault(name, []).append(seen)
    attacks = {
        name: attack([(seen["members"], seen["others"]) for seen in several])
        for name, several in runs.items()
    }
    figures = [
        (
            _draw(attacks, out / "membership.png"),
            "A likelihood-ratio attack on the images of shard 0; 95 % intervals",
        )
    ]
    return Section(
        "Membership", _findings(attacks), _table(cells[0], attacks, runs), figures, _claims(runs)
    )


def areas(runs: list[dict[str, Any]]) -> list[float]:
    """Of each seed."""
    return [auc(seen["members"], seen["others"]) for seen in runs]


def title(name: str) -> str:
    """Of an attacked model, for readers."""
    kind, _, state = name.partition(", ")
    return f"{TITLES[kind]}, {state}"


def _findings(attacks: dict[str, Attack]) -> list[str]:
    def told(names: Iterable[str]) -> str:
        return ", ".join(f"{title(name)} {attacks[name].auc:.2f}" for name in names)

    before = ", ".join(f"{TITLES[kind]} {attacks[f'{kind}, before'].auc:.2f}" for kind in TITLES)
    seen = [title(name) for name in FORGOTTEN if attacks[name].sees]
    verdict = f"above chance: {'; '.join(seen)}" if seen else "none is above chance"
    return [
        f"{'Missed' if seen else 'Reached'}: after exact forgetting an attack should see nothing. "
        f"AUC (0.5 is chance): {told(FORGOTTEN)}; {verdict}.",
        f"Before: {before}. After approximate forgetting: {told([*APPROXIMATE, AGAIN])}.",
    ]


def _table(cell: dict[str, Any], attacks: dict[str, Attack], runs: Attacked) -> str:
    rows = [
        "| model | AUC (95 % interval) | caught at 5 % false positives | test accuracy, % |",
        "| --- | --- | --- | --- |",
    ]
    for name, seen in attacks.items():
        accuracy = Mean.crossed(np.stack([right(one["outcome"]) for one in runs[name]]))
        low, high = seen.caught_interval
        rows.append(
            f"| {title(name)} | {seen.auc:.3f} ({seen.auc_interval[0]:.3f} to "
            f"{seen.auc_interval[1]:.3f}) | {seen.caught:.0%} ({low:.0%} to {high:.0%}) | "
            f"{accuracy.percent()} |"
        )
    return (
        f"{cell['images']}: {cell['members']} members are shard 0 of {cell['shards']}, and as many "
        f"others were drawn with them and seen by no model; {cell['retained']} images are "
        "retained. The attack is the likelihood ratio of Carlini et al. (2022) on the "
        f"logit-scaled confidence, with {cell['shadows']} shadow models of each kind; each has the "
        "retained images and a random half of the candidates, and each candidate is in half of "
        "them. The attacker knows the retained images, the other shards' deltas, and every option. "
        "Shadows of ascent and of fine-tuning on the rest forget in that way, too; those of a "
        "model after exact forgetting are those of before. Ascent ends when the loss of what is "
        "forgotten is what that of validation images was.\n\n" + "\n".join(rows)
    )


@pictures.styled()
def _draw(attacks: dict[str, Attack], path: Path) -> Path:
    figure = pictures.new_figure(height=4.6)
    axes = figure.subplots()
    names = [*attacks][::-1]
    for row, name in enumerate(names):
        seen = attacks[name]
        low, high = seen.auc_interval
        axes.errorbar(
            seen.auc,
            row,
            xerr=[[seen.auc - low], [high - seen.auc]],
            marker="o",
            markerfacecolor="white",
            color=COLOURS[name.partition(",")[0]],
        )
    axes.axvline(0.5, color=pictures.LEVEL, linestyle=(0, (1, 2)))
    axes.set_yticks(range(len(names)), [title(name) for name in names])
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("AUC of membership inference; 0.5 (dotted) is chance")
    pictures.note(figure, f"{pictures.TERMS} Bars: 95 % intervals over seeds and candidates.")
    return pictures.save(figure, path)


def _claims(runs: Attacked) -> list[Claim]:
    chance = [0.5] * len(areas(runs[AGAIN]))
    claims = [
        Claim(
            f"{TITLES[kind]}, before: the attack tells members from others",
            paired(areas(runs[f"{kind}, before"]), chance),
            "higher",
        )
        for kind in TITLES
    ]
    claims.append(
        Claim(
            "before: the attack sees more in an NLFT of all images than in the mean of TAFTs",
            paired(areas(runs["ordinary, before"]), areas(runs["tangent mean, before"])),
            "higher",
        )
    )
    claims += [
        Claim(
            f"{title(name)}: the attack sees no more than chance",
            paired(chance, areas(runs[name])),
            "not lower",
        )
        for name in FORGOTTEN
    ]
    claims += [
        Claim(
            f"{title(name)}: the attack sees more than after training again",
            paired(areas(runs[name]), areas(runs[AGAIN])),
            "higher",
        )
        for name in APPROXIMATE
    ]
    return claims
