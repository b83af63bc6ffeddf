"""Claims, and whether they hold: one by one, and over all of a part by Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from studies.paper.report.summary import Mean

LEVEL = 0.05
HOLDS, FAILS, OPEN = "holds", "does not hold", "not told apart"


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        text: What is claimed.
        difference: Of what should be higher (or no lower) less the other, paired.
        wanted: "higher": the difference is positive; "not lower": it is not negative.
        percent: Whether the difference is of fractions.
        chance: Of a difference as large if there were none; `held` corrects it.
    """

    text: str
    difference: Mean
    wanted: Literal["higher", "not lower"]
    percent: bool = True
    chance: float | None = None

    @property
    def verdict(self) -> str:
        """By its own chance: without `held`, as if it were the only claim."""
        chance = self.difference.chance if self.chance is None else self.chance
        if chance < LEVEL:
            return HOLDS if self.difference.value > 0 else FAILS
        return HOLDS if self.wanted == "not lower" else OPEN

    def shown(self) -> str:
        """The difference, as "+1.2 ± 0.4"."""
        if self.percent:
            return self.difference.points()
        return f"{self.difference.value:+.3g} ± {self.difference.error:.2g}"


def held(claims: Sequence[Claim]) -> list[Claim]:
    """The claims with their chances corrected for their number.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6, 1979: with it, the chance of any false finding among them is at most `LEVEL`.
    """
    order = sorted(range(len(claims)), key=lambda index: claims[index].difference.chance)
    corrected, least = {}, 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(claims) - place) * claims[index].difference.chance))
        corrected[index] = least
    return [replace(claim, chance=corrected[index]) for index, claim in enumerate(claims)]


def table(claims: Sequence[Claim]) -> str:
    """A row to each claim."""
    rows = ["| claim | difference, points | alone | of all here (Holm) |", "| --- " * 4 + "|"]
    for one, corrected in zip(claims, held(claims), strict=True):
        rows.append(f"| {one.text} | {one.shown()} | {one.verdict} | {corrected.verdict} |")
    return "\n".join(rows)
