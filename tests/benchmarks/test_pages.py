"""The pages state what the stored results say, and show pictures that are there."""

from __future__ import annotations

import re

import pytest

from benchmarks.publish import PAGES, all_stored, rewritten


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_is_a_stored_one(page) -> None:
    stored = all_stored()
    assert all(stored.values())
    _, stale = rewritten(page, stored)
    assert stale == [], "`make publish` writes them"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_picture_is_there(page) -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert pictures or page.name == "precision.md"  # which has none
    assert [name for name in pictures if not (page.parent / name).is_file()] == []
