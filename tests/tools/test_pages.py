"""Pages show pictures that exist, and the README states what the study found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_picture_exists(page: Path) -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert pictures or page != ROOT / "README.md"
    assert [name for name in pictures if not (page.parent / name).is_file()] == []


def test_the_readme_counts_the_claims_of_the_study() -> None:
    study = json.loads((ROOT / "docs/study/claims.json").read_text(encoding="utf-8"))
    verdicts = [claim["verdict"] for claim in study["claims"]]
    counts = [f"{verdicts.count(name)} {words}" for name, words in study["verdicts"].items()]
    text = f"Of {len(verdicts)} claims {', '.join(counts[:-1])} and {counts[-1]}."
    assert text in (ROOT / "README.md").read_text(encoding="utf-8")
