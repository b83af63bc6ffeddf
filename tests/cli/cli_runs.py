"""Commands of `tangent-ops`, run in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from tangent_ops.cli.app import app

MODEL = ["--model", "test_vit", "--no-pretrained", "--img-size", "32"]
FAST = ["--epochs", "1", "--lr", "1e-3", "--batch-size", "4"]


def run(*words: object, **env: str) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env=env)


def finetune(images: Path, out: Path, *words: object) -> Result:
    return run("finetune", images, "--out", out, *MODEL, *FAST, *words)


def parsed(result: Result) -> Any:
    """The JSON that a command with --json printed."""
    return json.loads(result.stdout)


def complaint(result: Result) -> str:
    """The message that a command printed about wrong options, checked to be one line."""
    assert result.exit_code == 2, result.output
    head, _, message = result.stderr.partition("error: ")
    assert (head, message.count("\n")) == ("", 1)
    return message


def refused(result: Result, said: str, code: int = 2) -> None:
    """The command ended with that exit code, and its stderr contains `said`."""
    assert (result.exit_code, said in result.stderr) == (code, True), result.output
