"""examples/shards.sh, as it is typed, on Ray and locally: the same bits."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shard_runs import bits, image_folder

from tangent_ops import load_delta
from tangent_ops.shards import Plan

SCRIPT = Path(__file__).parents[2] / "examples" / "shards.sh"
SMALL = ["--model", "test_vit", "--no-pretrained", "--img-size", "32", "--no-cache"]
SMALL += ["--epochs", "30", "--lr", "1e-3", "--batch-size", "4"]


def prepare(folder: Path) -> dict[str, str]:
    """Images, and this interpreter's tangent-ops; an environment that finds it."""
    binaries = folder / "bin"
    binaries.mkdir()
    command = binaries / "tangent-ops"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tangent_ops.cli "$@"\n')
    command.chmod(0o755)
    (binaries / "python").symlink_to(sys.executable)
    for name, seed, each in (("private", 0, 12), ("public", 1, 4), ("test", 2, 10)):
        image_folder(folder / name, each=each, seed=seed)
    return {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "COLUMNS": "200",
    }


def transcript(folder: Path, executor: str, environment: dict[str, str]) -> str:
    """What the script prints."""
    arguments = [str(folder / name) for name in ("private", "public", "test", executor)]
    done = subprocess.run(
        [str(SCRIPT), *arguments, executor, *SMALL],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,  # so much only on a busy machine
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="the script finds workers by pgrep")
def test_the_transcript(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra distributed is not installed")
    environment = prepare(tmp_path)
    runs = {}
    for executor in ("ray", "local"):
        printed = transcript(tmp_path, executor, environment)
        assert printed.count("killed a worker") == 2
        assert "6 shards trained" in printed
        assert "6 shards composed" in printed
        assert "forgot" in printed
        assert "5 shards composed" in printed
        scores = re.findall(r"composition of (\d) shards: ([\d.]+)% of 40 images", printed)
        assert [count for count, _ in scores] == ["6", "5"]
        assert all(float(score) > 60 for _, score in scores)  # one in four by guessing
        out = tmp_path / executor
        plan = Plan.open(out / "run")
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
        composed = [out / name for name in ("composed.safetensors", "without.safetensors")]
        runs[executor] = bits(plan), [path.read_bytes() for path in composed], logits
    assert len(runs["ray"][0]) == 5
    assert runs["ray"] == runs["local"]
