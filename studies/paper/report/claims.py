"""Claims, and whether they hold: a difference, seed by seed, against two standard errors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from studies.paper.report.summary import Mean, beyond

ERRORS = 2.0
HOLDS, FAILS, OPEN = "holds", "does not hold", "not told apart"


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        text: What is claimed.
        difference: Of what should be higher (or alike) less the other, paired by seed.
        wanted: "higher": the difference is positive; "not lower": it is not negative.
        reason: The likely reason, where it does not hold or is not told apart.
        percent: Whether the difference is of fractions.
    """

    text: str
    difference: Mean
    wanted: Literal["higher", "not lower"]
    reason: str = ""
    percent: bool = True

    @property
    def verdict(self) -> str:
        """Beyond two standard errors, of five seeds mostly: no proof, but no whim either."""
        opposite = Mean(-self.difference.value, self.difference.error, self.difference.count)
        if beyond(opposite, ERRORS):
            return FAILS
        if self.wanted == "not lower" or beyond(self.difference, ERRORS):
            return HOLDS
        return OPEN

    def shown(self) -> str:
        """The difference, as "+1.2 ± 0.4"."""
        factor = 100 if self.percent else 1
        value, error = factor * self.difference.value, factor * self.difference.error
        return f"{value:+.1f} ± {error:.1f}" if self.percent else f"{value:+.3g} ± {error:.2g}"


def table(claims: Iterable[Claim]) -> str:
    """A row to each claim."""
    rows = ["| claim | difference, points | verdict |", "| --- | --- | --- |"]
    rows += [f"| {claim.text} | {claim.shown()} | {claim.verdict} |" for claim in claims]
    return "\n".join(rows)


def not_held(claims: Iterable[Claim]) -> str:
    """What did not hold, or was not told apart, with the likely reason."""
    lines = []
    for claim in claims:
        if claim.verdict == HOLDS:
            continue
        why = f" {claim.reason}" if claim.reason else ""
        lines.append(f"- **{claim.text}**: {claim.verdict} ({claim.shown()}).{why}")
    return "\n".join(lines) if lines else "Everything held."
