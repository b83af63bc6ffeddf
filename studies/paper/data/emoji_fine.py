"""Emoji in fine classes, the subcategories of emoji.json, each as Google and as Twitter draw it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from studies.paper.data import emoji
from studies.paper.data.pool import Pool, Source

DRAWINGS = ("google", "twitter")
FEWEST = 18  # emoji in a class that is kept
# Man, woman, adult, their signs, "facing right", and what joins them: emoji that differ in these
# alone are drawn alike.
VARIED = {"1F468", "1F469", "1F9D1", "2642", "2640", "27A1", "200D", "FE0F"}


def load_fine(cache: Path) -> Pool:
    """Two drawings of each emoji, one after the other.

    Args:
        cache: Folder for what is fetched.

    Raises:
        DemoError: A package could not be had, or lacks an image.
    """
    entries = _one_of_each_figure(emoji.listed(cache))
    counts = Counter(entry["subcategory"] for entry in entries)
    classes = sorted(name for name, count in counts.items() if count >= FEWEST)
    kept = [entry for entry in entries if entry["subcategory"] in classes]
    pixels = torch.stack([emoji.pixels(drawing, kept, cache) for drawing in DRAWINGS], dim=1)
    targets = torch.tensor([classes.index(entry["subcategory"]) for entry in kept])
    return Pool(
        "emoji, fine", pixels.flatten(0, 1), targets.repeat_interleave(len(DRAWINGS)), classes
    )


def source() -> Source:
    packages = [emoji.PACKAGES[drawing] for drawing in DRAWINGS]
    note = (
        "on white; both drawings of each emoji, never in different parts; one emoji of those that "
        "differ in gender or direction alone; subcategories of at least "
        f"{FEWEST} emoji; categories Flags and Component left out"
    )
    return Source(
        "npm " + ", ".join(package.name for package in packages),
        "; ".join(emoji.LICENCES[drawing] for drawing in DRAWINGS),
        ", ".join(package.sha256 for package in packages),
        note,
    )


def _one_of_each_figure(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first entry with the fewest code points of each figure, in the entries' order."""
    first: dict[tuple[str, frozenset[str]], str] = {}
    for entry in sorted(entries, key=lambda entry: entry["unified"].count("-")):
        points = frozenset(entry["unified"].split("-"))
        figure = entry["subcategory"], points - VARIED or points
        first.setdefault(figure, entry["image"])
    kept = set(first.values())
    return [entry for entry in entries if entry["image"] in kept]
