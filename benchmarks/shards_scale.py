"""Ten thousand shards through plan, ledger and composition, with tiny deltas that nobody trained.

python -m benchmarks.shards_scale --out benchmarks/results/shards/scale.json --picture docs/shards-scale.png
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.record import ROOT, environment, write_json
from tangent_ops import Delta
from tangent_ops.shards import ImageData, Plan, ShardRecipe, check_settled, save_anchor, settle
from tangent_ops.shards.job import save

SIZES = (100, 300, 1000, 3000, 10000)
EACH = 2  # images of a shard
STEPS = {  # what is timed -> whether it should take longer with more shards
    "plan: hash, check, write": True,
    "train: write a delta": True,
    "list what is done": True,
    "compose: add to the ledger": True,
    "check that all is in line": True,
    "one worker: open, read its job": False,
    "find a sample": False,
    "read the composition": False,
}


def images(root: Path, count: int) -> list[str]:
    """So many images of four pixels, no two the same."""
    ids = []
    for index in range(count):
        folder = root / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.array([(index >> shift) & 255 for shift in (0, 8, 16, 24)], dtype=np.uint8)
        Image.fromarray(pixels.reshape(2, 2)).save(folder / f"{index}.png")
        ids.append(f"class{index % 2}/{index}.png")
    return ids


def measure(shards: int, folder: Path) -> dict[str, Any]:
    """Seconds of each step, all shards together, and bytes of memory beyond what imports took."""
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = call()
        seconds[name] = time.perf_counter() - began
        return found

    ids = images(folder / "images", EACH * shards)
    options: dict[str, Any] = {"num_classes": 2, "img_size": 32}
    torch.manual_seed(0)
    anchor = folder / "anchor.safetensors"
    save_anchor(timm.create_model("test_vit", **options), anchor, name="test_vit", options=options)
    before = _peak()
    assignment = {f"customer-{k}": ids[k * EACH : (k + 1) * EACH] for k in range(shards)}
    plan = timed(
        "plan: hash, check, write",
        lambda: Plan.create(
            folder / "run",
            anchor=anchor,
            data=ImageData(str(folder / "images")),
            recipe=ShardRecipe(blocks=0),
            assignment=assignment,
            progress=False,
        ),
    )
    like = plan.tangent().delta_dict()

    def write() -> None:
        generator = torch.Generator().manual_seed(0)
        for name in assignment:
            values = {key: torch.randn(v.shape, generator=generator) for key, v in like.items()}
            save(plan, plan.job(name), Delta(values, like.meta))

    timed("train: write a delta", write)
    timed("list what is done", plan.shards)
    timed("compose: add to the ledger", lambda: settle(plan))
    ledger = timed("check that all is in line", lambda: check_settled(plan))
    last = f"customer-{shards - 1}"
    timed("one worker: open, read its job", lambda: Plan.open(plan.path).job(last))
    timed("find a sample", lambda: plan.find(sample=ids[-1]))
    timed("read the composition", ledger.composed)
    return {"shards": shards, "seconds": seconds, "bytes": _peak() - before}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(shards: int) -> dict[str, Any]:
    """`measure` in a process of its own, whose peak of memory is its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.shards_scale", "--one", str(shards), folder]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def scale_table(content: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    rows: Sequence[Mapping[str, Any]] = content["rows"]
    lines = [
        "| | " + " | ".join(f"{row['shards']:,} shards" for row in rows) + " |",
        "| --- |" + " --- |" * len(rows),
    ]
    for name, grows in STEPS.items():
        shares = [1e3 * row["seconds"][name] / (row["shards"] if grows else 1) for row in rows]
        unit = "ms per shard" if grows else "ms"
        lines.append(f"| {name} | " + " | ".join(f"{v:.3g} {unit}" for v in shares) + " |")
    memory = " | ".join(f"{row['bytes'] / 1e6:.0f} MB" for row in rows)
    lines.append(f"| peak memory beyond the imports | {memory} |")
    made = content["environment"]
    return "\n".join(lines) + (
        f"\n\n{content['images of a shard']} images and 258 parameters to a shard. {made['cpu']}, "
        f"torch {made['torch']}, commit {made['commit']}, {made['date']}; "
        "`python -m benchmarks.shards_scale`."
    )


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Milliseconds to a shard, and memory to a shard, by the number of shards."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows: Sequence[Mapping[str, Any]] = content["rows"]
    sizes = [row["shards"] for row in rows]
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    marks = iter("os^Dv<>P")
    lines = iter(["-", "--", "-.", ":", "-", "--", "-.", ":"])
    greys = iter(["0.0", "0.0", "0.35", "0.35", "0.0", "0.0", "0.35", "0.35"])
    for name, grows in STEPS.items():
        values = [1e3 * row["seconds"][name] / (row["shards"] if grows else 1) for row in rows]
        panels[0 if grows else 1].plot(
            sizes, values, next(lines), marker=next(marks), color=next(greys), label=name
        )
    panels[0].set(title="all shards: time for each", ylabel="ms per shard")
    panels[1].set(title="one shard, or the mean: time in all", ylabel="ms")
    panels[2].plot(sizes, [row["bytes"] / 1e6 for row in rows], "k-o")
    panels[2].set(title="peak memory beyond the imports", ylabel="MB")
    panels[2].set_ylim(bottom=0)
    for panel in panels:
        panel.set(xscale="log", xlabel="shards")
        panel.grid(alpha=0.3)
    for panel in panels[:2]:
        panel.set_yscale("log")
        panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/shards-scale.json"), metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    parser.add_argument("--draw", action="store_true", help="only draw what is in --out")
    parser.add_argument("--shards", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--one", nargs=2, metavar=("SHARDS", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(int(options.one[0]), Path(options.one[1]))))
        return 0
    if options.draw:
        draw(json.loads(options.out.read_text()), options.picture)
        return 0
    rows = [in_a_process(shards) for shards in tqdm(options.shards, "sizes", unit="size")]
    content = {"environment": environment(), "images of a shard": EACH, "rows": rows}
    write_json(options.out, content)
    if options.picture:
        draw(content, options.picture)
    for row in rows:
        print(f"{row['shards']:>6} shards, {row['bytes'] / 1e6:.0f} MB")
        for name, value in row["seconds"].items():
            share = f", {1e3 * value / row['shards']:.3g} ms per shard" if STEPS[name] else ""
            print(f"       {name:<32} {value:8.3f} s{share}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
