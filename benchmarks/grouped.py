"""What a step of several shards at once costs beside their steps one after the other.

python -m benchmarks.grouped --out benchmarks/results/grouped/cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.record import environment, write_json
from benchmarks.timing import interleave
from tangent_ops import last_blocks, linearize
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.training.grouped import _Shard, _step
from tangent_ops.training.options import Options

MODEL = "vit_tiny_patch16_224"
CLASSES = 10
BLOCKS = {"TAFT-1, cached": 1, "TAFT-all": None}
Call = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """A number of shards, and seconds of a step of all: medians.

    Attributes:
        ratio: median over rounds of grouped / separate, which are each other's neighbours in time.
    """

    shards: int
    grouped: float
    separate: float
    ratio: float
    rounds: int


def steps(
    name: str, size: int, blocks: int | None, count: int, batch: int, device: torch.device
) -> dict[str, Call]:
    """The same shards' steps of `fit_grouped`, together and each in a group of its own."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, num_classes=CLASSES).to(device)
    tangent = linearize(model, None if blocks is None else last_blocks(model, blocks), check=False)
    inputs = torch.randn(count, batch, 3, size, size, device=device)
    tail = tangent
    if blocks is not None:
        trunk, tail = tangent.split()
        inputs = torch.stack([trunk(images) for images in inputs])
    options = Options(None, 1, 1e-4, "adamw", 0.0, "constant", 0, None, False)

    def shards() -> list[_Shard]:
        made = []
        for i, images in enumerate(inputs.cpu()):
            data = TensorDataset(images, torch.randint(CLASSES, (batch,)))
            shard = _Shard(str(i), tangent, DataLoader(data, batch), device, options)
            shard.advance()
            made.append(shard)
        return made

    loss = RescaledSquareLoss()
    group, alone = shards(), shards()

    def separate() -> None:
        for shard in alone:
            _step(tail, [shard], loss, device, options)

    return {"grouped": partial(_step, tail, group, loss, device, options), "separate": separate}


def measure(calls: dict[str, Call], count: int, device: torch.device, budget: float) -> Row:
    seconds = interleave(
        {name: [call] for name, call in calls.items()}, device=device, budget=budget
    )
    grouped, separate = seconds["grouped"], seconds["separate"]
    return Row(
        shards=count,
        grouped=statistics.median(grouped),
        separate=statistics.median(separate),
        ratio=statistics.median(a / b for a, b in zip(grouped, separate, strict=True)),
        rounds=len(grouped),
    )


def grouped_table(content: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    rows: Mapping[str, Sequence[Mapping[str, float]]] = content["rows"]
    counts = [row["shards"] for row in next(iter(rows.values()))]
    lines = [
        "| time of a step together / apart | " + " | ".join(f"{n} shards" for n in counts) + " |",
        "| --- |" + " --- |" * len(counts),
    ]
    for what, values in rows.items():
        lines.append(f"| {what} | " + " | ".join(f"{row['ratio']:.2f}" for row in values) + " |")
    made = content["environment"]
    malloc = "" if made["malloc"] == "defaults" else made["malloc"] + " "
    return "\n".join(lines) + (
        f"\n\n{content['setting']}. Medians of interleaved rounds. {made['cpu']}, "
        f"{made['threads']} threads, torch {made['torch']}, commit {made['commit']}, "
        f"{made['date']}; `{malloc}python -m benchmarks.grouped`."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/grouped.json"), metavar="FILE")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--size", type=int, default=96, help="of the images, in pixels")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch", type=int, default=4, help="samples of each shard")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seconds", type=float, default=10.0, help="per number of shards")
    options = parser.parse_args(arguments)
    rows: dict[str, list[dict[str, float]]] = {}
    for what, blocks in BLOCKS.items():
        rows[what] = []
        for count in options.shards:
            calls = steps(options.model, options.size, blocks, count, options.batch, options.device)
            row = measure(calls, count, options.device, options.seconds)
            rows[what].append(asdict(row))
            print(
                f"{what}, {count} shards: {row.grouped * 1e3:.1f} ms together, "
                f"{row.separate * 1e3:.1f} ms apart, ratio {row.ratio:.2f}",
                flush=True,
            )
    setting = (
        f"{options.model} at {options.size} px, random weights, {options.batch} samples a shard, "
        "AdamW; one step of every shard"
    )
    found = environment(options.device)
    write_json(options.out, {"environment": found, "setting": setting, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
