"""`Section`: what a part of the study becomes on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from studies.paper.report.claims import Claim


@dataclass(frozen=True)
class Section:
    """One part.

    Attributes:
        title: Its heading.
        findings: What came out, in plain words and with figures: a sentence or two to each. They
            stand on the page's first screen.
        text: Markdown: tables.
        figures: Files, and what they show.
        claims: What is claimed, and the differences that decide; corrected for their number.
    """

    title: str
    findings: Sequence[str]
    text: str
    figures: Sequence[tuple[Path, str]]
    claims: Sequence[Claim]
