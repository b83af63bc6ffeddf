"""The code blocks of Markdown pages, and the programs that a page's Python blocks make together."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
SKIPPED = {"node_modules", "build", "dist", "out", "downloads"}
FENCE = re.compile(r"^( *)(```+|~~~+) *([\w+-]*)(.*)$")
NEEDS = re.compile(r"^ *<!-- needs (cuda|network|time|package [\w.]+): (\S.*?) -->$")
SET_UP = re.compile(r"\[set-up\]\(([^)\s]+\.py)\)")


class PageError(Exception):
    """What is wrong on a page, with its line."""


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        page: The page's path.
        line: The line of the page on which the code starts, from 1.
        language: That of the fence; "" if it names none; None for a block that is only indented.
        code: The code, without the indentation of the block.
        needs: "cuda", "network", "time" or "package NAME" if not every machine can run it.
    """

    page: Path
    line: int
    language: str | None
    code: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages(root: Path = ROOT) -> list[Path]:
    """Every Markdown page of the checkout."""
    found = []
    for path in sorted(root.rglob("*.md")):
        folders = path.relative_to(root).parts[:-1]
        if not any(name in SKIPPED or name.startswith(".") for name in folders):
            found.append(path)
    return found


def blocks(page: Path) -> list[Block]:
    """The page's code blocks, fenced and indented, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return list(_blocks(page, lines))


def _blocks(page: Path, lines: list[str]) -> Iterator[Block]:
    at, needs = 0, None
    while at < len(lines):
        line = lines[at]
        start = at
        if fence := FENCE.match(line):
            indent, ticks, language, rest = fence.groups()
            if language == "python" and rest.strip():
                raise PageError(f"{page}:{at + 1}: {rest.strip()!r} after ```python")
            at += 1
            while at < len(lines) and not re.match(rf"^ *{ticks} *$", lines[at]):
                at += 1
            code = [row.removeprefix(indent) for row in lines[start + 1 : at]]
            yield Block(page, start + 2, language, "\n".join(code) + "\n", needs)
            at += 1
        elif line.startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            code = "\n".join(row[4:] for row in lines[start:at]).strip("\n")
            yield Block(page, start + 1, None, code + "\n", None)
        else:
            at += 1
        if line.strip():
            if line.lstrip().startswith("<!-- needs ") and not NEEDS.match(line):
                ways = "cuda, network, time, package NAME"
                raise PageError(f"{page}:{start + 1}: {line.strip()}: not '<!-- needs WHAT: "
                                f"the reason -->' with one of {ways}")  # fmt: skip
            found = NEEDS.match(line)
            needs = found[1] if found else None


def python_blocks(page: Path) -> list[Block]:
    """The blocks that are fenced as Python.

    Raises:
        PageError: Python that is only indented, so that no test would run it.
    """
    found = []
    for block in blocks(page):
        if block.language == "python":
            found.append(block)
        elif block.language in (None, "") and re.match(r"(import|from|def|class|@)\b", block.code):
            raise PageError(f"{block}: fence this code as ```python, so that it runs in the tests")
    return found


def set_up(page: Path) -> Path | None:
    """The file that makes the names that the page's code starts from: its link named set-up.

    Raises:
        PageError: There are several, or the file does not exist.
    """
    names = SET_UP.findall(re.sub(r"`[^`\n]*`", "", page.read_text(encoding="utf-8")))
    if len(names) > 1:
        raise PageError(f"{page}: {len(names)} links named set-up; a page has one, or none")
    if names and not (page.parent / names[0]).is_file():
        raise PageError(f"{page}: its set-up {names[0]} does not exist")
    return (page.parent / names[0]).resolve() if names else None


def run(page: Path, able: set[str]) -> dict[str, Any]:
    """Run the page's set-up and blocks in order, as one program; the names that it made.

    Args:
        page: The page.
        able: What this machine can do, of "cuda", "network" and "time". A block that needs another
            thing, or a package that is not installed, is checked (`check`) and not run.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    if (file := set_up(page)) is not None:
        exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), names)
    for block in python_blocks(page):
        if block.needs is None or block.needs in able or _installed(block.needs):
            exec(_compiled(block), names)
        else:
            check(block, names)
    return names


def _installed(needs: str) -> bool:
    kind, _, package = needs.partition(" ")
    return kind == "package" and importlib.util.find_spec(package) is not None


def _compiled(block: Block) -> Any:
    """With the page's own lines, so that a traceback names the line of the page."""
    return compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")


def check(block: Block, names: dict[str, Any]) -> None:
    """Check a block that is not run: its syntax, its imports, and that all its names are defined.

    Args:
        block: The block. Imports of the package that it needs are left out.
        names: Those that are defined before it. What the block defines is added, as None unless
            it is imported.

    Raises:
        PageError: An undefined name, or an attribute that an imported module lacks.
        ImportError: An import that fails.
        SyntaxError: It does not compile.
    """
    _compiled(block)
    tree = ast.parse(block.code)
    missing = (block.needs or "").removeprefix("package ")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found = _import(alias.name, missing)
                name = alias.asname or alias.name.partition(".")[0]
                top = alias.name if alias.asname else alias.name.partition(".")[0]
                names[name] = importlib.import_module(top) if found else None
        elif isinstance(node, ast.ImportFrom):
            found = _import(node.module or "", missing)
            for alias in node.names:
                names[alias.asname or alias.name] = found and _member(found, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.setdefault(node.id, None)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.setdefault(node.name, None)
        elif isinstance(node, ast.arg):
            names.setdefault(node.arg, None)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.setdefault(node.name, None)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in names and not hasattr(builtins, node.id):
            raise PageError(f"{block}: line {node.lineno} of the block: {node.id} is not defined")
        if isinstance(node, ast.Attribute):
            _resolve(node, names, block)


def _import(name: str, missing: str) -> ModuleType | None:
    return None if name.partition(".")[0] == missing else importlib.import_module(name)


def _member(module: ModuleType, name: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    return importlib.import_module(f"{module.__name__}.{name}")


def _resolve(node: ast.expr, names: dict[str, Any], block: Block) -> Any:
    """The module or member of a module that an expression such as `torch.nn.Linear` names."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = _resolve(node.value, names, block)
    if not isinstance(owner, ModuleType):
        return None
    if not hasattr(owner, node.attr):
        raise PageError(f"{block}: {owner.__name__} has no {node.attr}")
    return getattr(owner, node.attr)
