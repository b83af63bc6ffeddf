"""MkDocs hooks: the pages at their own paths, the API from docstrings, and executed tutorials."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.pages.blocks import ROOT, pages
from tools.pages.notebooks import execute

REFERENCE = "docs/reference/"
TUTORIALS = "docs/tutorials/"
LINK = re.compile(r"\]\(([^)\s#]+)")


def on_config(config: MkDocsConfig) -> None:
    """The navigation with pages in place of each `FOLDER/*.md`."""
    rest = {page.relative_to(ROOT).as_posix() for page in pages()} - set(_named(config.nav))
    config.nav = _filled(config.nav, sorted(rest))


def _filled(nav: Any, rest: list[str]) -> Any:
    if isinstance(nav, dict):
        return {title: _filled(part, rest) for title, part in nav.items()}
    if isinstance(nav, str):
        return nav
    filled = []
    for part in nav:
        if isinstance(part, str) and part.endswith("/*.md"):
            filled += [name for name in rest if str(Path(name).parent / "*.md") == part]
        else:
            filled.append(_filled(part, rest))
    return filled


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """What the site is made of: the same relative links work in it and on the code host.

    The theme's files stay. Every page of the checkout is added, and every file that a page shows or
    links to; a page of the reference for each one that the navigation names; the tutorials.
    """
    of_theme = [file for file in files if file.generated_by is None and not _in_docs(file)]
    sources = {*pages(), *(ROOT / "docs").glob("*.css"), *(ROOT / "docs").glob("*.js")}
    for page in pages():
        linked = (page.parent / target for target in LINK.findall(page.read_text("utf-8")))
        sources |= {path.resolve() for path in linked if path.is_file()}
    found = Files(of_theme)
    for path in sorted(sources):
        name = path.relative_to(ROOT).as_posix()
        found.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    package = griffe.load("tangent_ops", search_paths=[ROOT])
    for name in _named(config.nav):
        if name.startswith(REFERENCE):
            module = Path(name).stem
            found.append(File.generated(config, name, content=_reference(module, package)))
    for script in sorted((ROOT / TUTORIALS).glob("*.py")):
        for name, content in execute(script).items():
            found.append(File.generated(config, f"{TUTORIALS}{name}", content=content))
    return found


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """A link to a tutorial's source leads to its page, except on that page."""
    if page.file.src_uri.startswith(TUTORIALS):
        return markdown
    return re.sub(rf"(\]\([^)\s]*{Path(TUTORIALS).name}/\w+)\.py\)", r"\1.md)", markdown)


def _in_docs(file: File) -> bool:
    return file.abs_src_path is not None and Path(file.abs_src_path).is_relative_to(ROOT / "docs")


def _named(nav: Any) -> list[str]:
    """The paths in the navigation."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [name for part in parts for name in _named(part)]


def _reference(name: str, package: Any) -> str:
    """The page of a module: its docstring, and each of its public names."""
    module = package[name.partition(".")[2]] if "." in name else package
    public = module.exports
    if public is None:  # a module without __all__: what is defined in it
        public = [
            member.name
            for member in module.members.values()
            if not member.is_alias and not member.name.startswith("_") and member.has_docstring
        ]
    if not public:
        raise PluginError(f"{REFERENCE}{name}.md: {name} has no public names")
    lines = [f"# `{name}`", "", f"::: {name}"]
    lines += [
        "    options: { members: false, show_root_heading: false, show_root_toc_entry: false }",
        "",
    ]
    for member in sorted(public, key=str.lower):
        found = module.members.get(member)
        if found is not None and not found.is_alias and found.is_attribute and not found.docstring:
            lines += [f"## `{member}`", "", f"`{found.value}`", ""]
        elif found is None or found.is_alias or not found.is_module:
            lines += [f"::: {name}.{member}", ""]
        elif member in found.members:  # a function in a module of its name
            lines += [f"::: {name}.{member}.{member}", ""]
        else:
            link = f"[`{name}.{member}`]({name}.{member}.md)"
            lines += [f"## `{member}`", "", f"A module: {link}.", ""]
    return "\n".join(lines)
