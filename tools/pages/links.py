"""The relative links of Markdown pages, and the anchors of their headings."""

from __future__ import annotations

import re
from pathlib import Path

from tools.pages.blocks import blocks

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.*?) *#* *$")


def text_of(page: Path) -> list[str]:
    """The page's lines, those of code blocks and code spans blank."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        first = block.line - 1 if block.language is None else block.line - 2
        count = block.code.count("\n") + (0 if block.language is None else 2)
        lines[first : first + count] = [""] * len(lines[first : first + count])
    return lines


def targets(page: Path) -> list[tuple[str, str]]:
    """Of each relative link and picture: the path as written ("" for the page), and the anchor."""
    text = re.sub(r"`[^`\n]*`", "", "\n".join(text_of(page)))
    found = [target for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    return [(path, anchor) for path, _, anchor in (target.partition("#") for target in found)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub, GitLab and the site give to the page's headings."""
    found: set[str] = set()
    for line in text_of(page):
        if heading := HEADING.match(line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            number, name = 0, slug
            while name in found:
                number += 1
                name = f"{slug}-{number}"
            found.add(name)
    return found


def broken(page: Path) -> list[str]:
    """The relative links of the page that lead nowhere."""
    lost = []
    for path, anchor in targets(page):
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            lost.append(path)
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            lost.append(f"{path}#{anchor}")
    return lost
