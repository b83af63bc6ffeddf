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
        text: Markdown.
        figures: Files, and what they show.
        claims: What is claimed, and the differences that decide.
    """

    title: str
    text: str
    figures: Sequence[tuple[Path, str]]
    claims: Sequence[Claim]
