"""examples/shards.sh, as it is typed, on Ray; and the same locally: the same bits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shard_runs import bits, image_folder
from typer.testing import CliRunner

from tangent_ops import load_delta
from tangent_ops.cli.app import app
from tangent_ops.shards import Plan

SCRIPT = Path(__file__).parents[2] / "examples" / "shards.sh"
SMALL = ["--model", "test_vit", "--no-pretrained", "--img-size", "32", "--no-cache"]
SMALL += ["--epochs", "30", "--lr", "1e-3", "--batch-size", "4"]


def transcript(folder: Path) -> str:
    """What the script prints, with this interpreter's tangent-ops."""
    binaries = folder / "bin"
    binaries.mkdir()
    command = binaries / "tangent-ops"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tangent_ops.cli "$@"\n')
    command.chmod(0o755)
    (binaries / "python").symlink_to(sys.executable)
    for name, seed, each in (("private", 0, 12), ("public", 1, 4), ("test", 2, 10)):
        image_folder(folder / name, each=each, seed=seed)
    arguments = [str(folder / name) for name in ("private", "public", "test", "ray")]
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "COLUMNS": "200",
    }
    done = subprocess.run(
        [str(SCRIPT), *arguments, "ray", *SMALL],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    return done.stdout


def locally(folder: Path) -> Plan:
    """The same by the local executor, in this process but for its workers."""
    out = folder / "local"
    words = ["--public", folder / "public", "--out", out / "run", "--shards", 6, "--workers", 2]
    for command in (
        ["finetune", folder / "private", *words, *SMALL],
        ["compose", out / "run", "--out", out / "composed.safetensors"],
        ["forget", out / "run", "--shard", "shard-3", "--yes"],
        ["compose", out / "run", "--out", out / "without.safetensors"],
    ):
        out.mkdir(exist_ok=True)
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, result.output
    return Plan.open(out / "run")


@pytest.mark.slow
def test_the_transcript(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra distributed is not installed")
    printed = transcript(tmp_path)
    assert printed.count("killed a worker") == 2
    assert "6 shards trained" in printed
    assert "6 shards composed" in printed
    assert "forgot" in printed
    assert "5 shards composed" in printed
    scores = re.findall(r"composition of (\d) shards: ([\d.]+)% of 40 images", printed)
    assert [count for count, _ in scores] == ["6", "5"]
    assert all(float(score) > 60 for _, score in scores)  # one in four by guessing
    out = tmp_path / "ray"
    plan = Plan.open(out / "run")
    assert len(bits(plan)) == 5
    assert "shard-3" not in [shard.name for shard in plan.shards()]

    logits = json.loads(printed.rpartition("exported model: ")[2].splitlines()[0])
    tangent = plan.tangent()
    tangent.load_delta_dict(load_delta(out / "without.safetensors"))
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    with torch.no_grad():
        expected = tangent(images).flatten()
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-4)
    task = load_file(out / "task.safetensors")
    assert all(torch.equal(task[name], d) for name, d in tangent.full_delta_dict().items())

    assert bits(locally(tmp_path)) == bits(plan)
    for name in ("composed.safetensors", "without.safetensors"):
        assert (tmp_path / "local" / name).read_bytes() == (out / name).read_bytes()
