"""Markdown pages: commands exist, the README states what the study found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tools.pages import commands
from tools.pages.blocks import ROOT, pages, python_blocks

EVERY_PAGE = pytest.mark.parametrize("page", pages(), ids=lambda p: p.relative_to(ROOT).as_posix())


@EVERY_PAGE
def test_commands_exist(page: Path) -> None:
    pytest.importorskip("typer", reason="the extra for the command line is not installed")
    for place, command in commands.commands(page):
        try:
            commands.check(command)
        except (commands.CommandError, ValueError) as error:
            pytest.fail(f"{place}: {command}: {error}")


@pytest.mark.parametrize(
    "command",
    [
        "tangent-ops finetune photos --out run --by customer  # a comment",
        "tangent-ops compose run --how mean; tangent-ops forget run --label x && make test",
        "tangent-ops ledger forget models customer-7 --samples one.safetensors",
        "tangent-ops --version",
        'make test ARGS="-k x" OUT=folder',
        "TRITON_INTERPRET=1 python3 -m pytest tests/test_docs.py::test_page -k x",
        "python -m tools.coverage --only 'swin|eva'",
        'pip install ".[cli,privacy]" other',
        ".ci/run",
        "git stash",
    ],
)
def test_a_right_command(command: str) -> None:
    pytest.importorskip("typer", reason="the extra for the command line is not installed")
    commands.check(command)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("tangent-ops fine-tune photos", "no command 'fine-tune'"),
        ("tangent-ops compose run --who mean", "no option --who"),
        ("tangent-ops compose run --how median", "takes .*mean.*, not 'median'"),
        ("tangent-ops compose run other", "takes 1 arguments, not 2"),
        ("make tests", "no target 'tests'"),
        ("make test ARG=1", "no variable ARG"),
        ("make test; make tests", "no target 'tests'"),
        ("python -m tools.nothing", "no such module"),
        ("python -m tools.coverage --onyl x", "no option --onyl"),
        ("python examples/nothing.py", "no such file"),
        ("pytest tests/nothing.py", "no such file"),
        ('pip install ".[everything]"', "no extra 'everything'"),
        ("rm -rf x", "rm: unknown"),
    ],
)
def test_a_wrong_command(command: str, message: str) -> None:
    pytest.importorskip("typer", reason="the extra for the command line is not installed")
    with pytest.raises(commands.CommandError, match=message):
        commands.check(command)


def test_the_reference_has_every_module_that_code_on_pages_imports() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    code = "".join(block.code for page in pages() for block in python_blocks(page))
    modules = set(re.findall(r"^ *from (tangent_ops[\w.]*) import", code, flags=re.MULTILINE))
    assert len(modules) > 3
    assert [name for name in sorted(modules) if f"docs/reference/{name}.md" not in nav] == []


def test_the_readme_says_what_the_study_found() -> None:
    study = json.loads((ROOT / "docs/study/claims.json").read_text(encoding="utf-8"))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert study["counted"] in readme
    for part, number in (("Accuracy", 0), ("Composition", 0), ("Composition", 2)):
        assert study["findings"][part][number] in readme
