"""The commands of examples/shards.sh in this process, and the script itself on Ray and locally."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shard_runs import bits, image_folder, run_here
from typer.testing import CliRunner

from tangent_ops import load_delta
from tangent_ops.cli.app import app
from tangent_ops.shards import Plan

SCRIPT = Path(__file__).parents[2] / "examples" / "shards.sh"
SMALL = ["--model", "test_vit", "--no-pretrained", "--img-size", "32", "--no-cache"]
SMALL += ["--epochs", "30", "--lr", "1e-3", "--batch-size", "4"]
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, seed, each in (("private", 0, 12), ("public", 1, 4), ("test", 2, 10)):
        image_folder(tmp_path / name, each=each, seed=seed)
    return tmp_path


def commands(folder: Path, executor: str) -> list[list[str]]:
    """The arguments of tangent-ops on every line of the script that calls it."""
    names = ("private", "public", "test")
    values = {name: str(folder / name) for name in names}
    values |= {"out": str(folder / executor), "executor": executor}
    lines = SCRIPT.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    calls = [line.removesuffix("&") for line in lines if line.startswith("say tangent-ops ")]
    assert len(calls) == 7
    rest = shlex.join([*SMALL, "--epochs", "12"])  # no worker is killed: fewer are enough
    return [
        [string.Template(word).substitute(values) for word in shlex.split(call)[2:]]
        for call in (line.replace('"$@"', rest) for line in calls)
    ]


def check(printed: str, out: Path, logits: torch.Tensor) -> tuple[object, ...]:
    """Checks output and files; returns what has to be the same on every executor."""
    assert "6 shards trained" in printed
    assert "forgot" in printed
    assert re.findall(r"(\d) shards composed", printed) == ["6", "5"]
    scores = re.findall(r"composition of (\d) shards \(mean\): ([\d.]+)% of 40 images", printed)
    assert [count for count, _ in scores] == ["6", "5"]
    assert all(float(score) > 60 for _, score in scores)  # one in four by guessing
    plan = Plan.open(out / "run")
    assert "shard-3" not in [shard.name for shard in plan.shards()]

    tangent = plan.tangent()
    tangent.load_delta_dict(load_delta(out / "without.safetensors"))
    with torch.no_grad():
        expected = tangent(IMAGES)
    torch.testing.assert_close(logits.view_as(expected), expected, rtol=1e-4, atol=1e-4)
    task = load_file(out / "task.safetensors")
    assert all(torch.equal(task[name], d) for name, d in tangent.full_delta_dict().items())
    composed = [(out / f"{name}.safetensors").read_bytes() for name in ("composed", "without")]
    assert len(bits(plan)) == 5
    return bits(plan), composed, logits.tolist()


def test_the_commands_of_the_script(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tangent_ops.shards.run.run_local", run_here)
    monkeypatch.setenv("COLUMNS", "200")
    out = folder / "local"
    out.mkdir()
    printed = ""
    for words in commands(folder, "local"):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        printed += result.stdout
    program = torch.export.load(out / "model.pt2").module()
    check(printed, out, program(IMAGES))


def transcript(folder: Path, executor: str) -> str:
    """What the script prints, with this interpreter's tangent-ops."""
    binaries = folder / "bin"
    if not binaries.exists():
        binaries.mkdir()
        command = binaries / "tangent-ops"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tangent_ops.cli "$@"\n')
        command.chmod(0o755)
        (binaries / "python").symlink_to(sys.executable)
    arguments = [str(folder / name) for name in ("private", "public", "test", executor)]
    done = subprocess.run(
        [str(SCRIPT), *arguments, executor, *SMALL],
        env={
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
        timeout=900,  # so much only on a busy machine
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed a worker") == 2
    return done.stdout


@pytest.mark.long
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="the script finds workers by pgrep")
def test_the_transcript(folder: Path) -> None:
    pytest.importorskip("ray", reason="the extra distributed is not installed")
    runs = []
    for executor in ("ray", "local"):
        printed = transcript(folder, executor)
        logits = json.loads(printed.rpartition("exported model: ")[2].splitlines()[0])
        runs.append(check(printed, folder / executor, torch.tensor(logits)))
    assert runs[0] == runs[1]
