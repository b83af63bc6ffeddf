"""Version, help, missing extras and start-up of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tangent_ops.cli import main
from tangent_ops.cli.app import app

ROOT = Path(__file__).resolve().parents[2]


def test_the_version_is_the_packages() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    try:
        installed = metadata.version("tangent-ops")
    except metadata.PackageNotFoundError:
        installed = "(not installed)"
    assert result.stdout == f"tangent-ops {installed}\n"


COMMANDS = ["finetune", "compose", "evaluate", "forget", "ledger", "profile", "export", "privacy"]
IN_HELP = {
    "": [*COMMANDS, "--install-completion"],
    "finetune": ["--public", "Examples"],
    "ledger": ["add", "forget", "list", "verify", "export"],
}


@pytest.mark.parametrize(("command", "words"), IN_HELP.items())
def test_help_says_where_to_begin(command: str, words: list[str]) -> None:
    """Users who miss an extra read the help first."""
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert [word for word in words if word not in result.stdout] == []


@pytest.mark.parametrize("missing", ["typer", "rich", "jinja2"])
def test_without_its_extra_it_says_how_to_get_it(
    missing: str, not_installed, capsys: pytest.CaptureFixture[str]
) -> None:
    not_installed(missing)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert missing in printed and 'pip install "tangent-ops[cli]"' in printed
    assert printed.count("\n") == 1


def test_it_runs_uninstalled_and_help_loads_neither_timm_nor_triton(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['tangent-ops', 'profile', '--help']\n"
        "try:\n"
        "    runpy.run_module('tangent_ops.cli', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print('exit', stop.code)\n"
        "print('loaded', sorted({'timm', 'triton', 'jinja2'} & set(sys.modules)))\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--against" in done.stdout
    assert done.stdout.endswith("exit 0\nloaded []\n")
