"""Statistics in cores of public images, for every number of shards, beside a probe; prints a table.

    python -m studies.core_statistics emoji fashion silhouettes mnist

The protocol is that of studies.paper: an anchor and a core from 100 public images, 1,000 private
images, 400 test images or what the set has, five seeds. l2 is chosen by generalised
cross-validation of the statistics. Each seed's first core is summed again over several shards, at
random and by class: the sums must be the same bits.
"""

from __future__ import annotations

import argparse
import functools
import operator
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from assets import default_cache

from studies.paper.methods import probe
from studies.paper.parts.context import Context, score
from studies.paper.parts.dealing import LOSS, deal
from studies.paper.tokens import FEATURES
from tangent_ops import core_basis, linearize, statistics
from tangent_ops.composition.head_only import probe as head_alone

SIZES = {"public": 100, "train": 1000, "validation": 136}
CORES: dict[str, dict[str, Any]] = {
    "core, 8 x 8 a layer": {"size": 8},
    "core, 16 x 16 a layer": {"size": 16},
    "core of 384 directions": {"directions": 384},
    "core of 1,000 directions": {"directions": 1000},
    "gradients, 8 x 8 a layer": {"size": 8, "method": "gradient"},
    "random, 8 x 8 a layer": {"size": 8, "method": "random"},
}


def run(
    context: Context, images: str, seed: int, cores: list[str], numbers: list[int]
) -> dict[str, float]:
    """Way -> percent of test images."""
    cell = {**SIZES, "images": images, "seed": seed, "shards": 1}
    dealt, prepared = deal(context, cell), context.prepared(images)
    public, private, _ = prepared.drawn(seed, list(SIZES.values()))
    rows = torch.cat([public, private])
    head = probe(prepared.rows(FEATURES, rows), len(prepared.classes), LOSS, seed)
    found = {
        "anchor": score(dealt.anchor, dealt.tested),
        "probe of all images, by steps": score(head, prepared.tested(FEATURES)),
    }
    for number, name in enumerate(cores):
        data = None if CORES[name].get("method") == "random" else prepared.rows(1, public)
        tangent = linearize(dealt.anchor, core=core_basis(dealt.anchor, data, **CORES[name]))
        began = time.perf_counter()
        sums = statistics(tangent, dealt.private, progress=False)
        seconds = time.perf_counter() - began
        print(f"  {images} {seed} {name}: {seconds:.1f} s, {sums.nbytes / 1e6:.1f} MB", flush=True)
        if number == 0:
            tangent.load_delta_dict(head_alone(sums))
            found["head alone, in closed form"] = score(tangent, dealt.tested)
            for dealing in ("iid", "by class"):
                for shards in numbers:
                    parts = deal(context, {**cell, "deal": dealing, "shards": shards}).shards
                    each = [statistics(tangent, part, progress=False) for part in parts]
                    if functools.reduce(operator.add, each) != sums:
                        raise SystemExit(f"{shards} shards {dealing} have other sums")
        tangent.load_delta_dict(sums.choose().delta)
        found[name] = score(tangent, dealt.tested)
    return {way: 100 * value for way, value in found.items()}


def main(arguments: list[str] | None = None) -> None:
    """Run all seeds of all sets, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", choices=("emoji", "fashion", "silhouettes", "mnist"))
    parser.add_argument("--cores", nargs="+", choices=list(CORES), default=list(CORES)[:1])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shards", type=int, nargs="*", default=[2, 5, 10, 25, 50])
    parser.add_argument("--cache", type=Path, default=default_cache())
    given = parser.parse_args(arguments)
    context = Context(given.cache, tuple((name, (1,)) for name in given.images))
    for images in given.images:
        rest = (given.cores, given.shards)
        scores = [run(context, images, seed, *rest) for seed in range(given.seeds)]
        for way in scores[0]:
            own = [one[way] for one in scores]
            lead = [one[way] - one["probe of all images, by steps"] for one in scores]
            spread = [stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in (own, lead)]
            print(
                f"{images:12} {way:32} {mean(own):5.1f} ± {spread[0]:.1f}   "
                f"beyond the probe: {mean(lead):+.1f} ± {spread[1]:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
