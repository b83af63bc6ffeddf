"""The pages state what the stored results say, and show pictures that are there."""

from __future__ import annotations

import re

import pytest

from benchmarks.publish import PAGES, rewritten
from benchmarks.stored import newest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_is_a_stored_one(page) -> None:
    results = list(newest().values())
    assert results
    _, stale = rewritten(page, results)
    assert stale == [], "`make publish` writes them"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_picture_is_there(page) -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert pictures
    assert [name for name in pictures if not (page.parent / name).is_file()] == []
