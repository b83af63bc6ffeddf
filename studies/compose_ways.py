"""Ways to compose exact fits of emoji's shards, beside statistics; prints one table.

    python -m studies.compose_ways

The protocol is that of studies.paper: an anchor from 100 public images, 1,000 private images, one
trained block and the head, 400 test images, l2 = 10 for the shards. Other penalties are chosen by
generalised cross-validation, without images. Sums with their residuals at each shard's own delta
are in no way of `compose`, since they gain nothing; they are in the table to show that.
"""

from __future__ import annotations

import argparse
import functools
import operator
import statistics as summary
import warnings
from collections import defaultdict
from pathlib import Path

import torch

from studies.paper.parts.context import Context, score
from studies.paper.parts.dealing import Dealt, deal, reset
from tangent_ops import (
    CachedFeatures,
    LinearizedModel,
    compose,
    core_basis,
    fit_exact,
    linearize,
    statistics,
)
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.delta import Delta
from tangent_ops.errors import NotConvergedWarning
from tangent_ops.exact import Problem, head_statistics

SIZES = {"images": "emoji", "public": 100, "train": 1000, "validation": 136}
L2, TOLERANCE = 10.0, 1e-2


def fits(tangent: LinearizedModel, dealt: Dealt) -> list[Delta]:
    """The shards' optima."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotConvergedWarning)
        for shard in dealt.shards:
            reset(tangent)
            fit_exact(Problem(tangent, shard, L2, progress=False), TOLERANCE, method="dual")
            found.append(tangent.delta_dict())
    return found


def scores(dealt: Dealt) -> dict[str, float]:
    """Way -> fraction of test images that its composition gets right."""
    tangent = linearize(dealt.anchor)
    deltas = fits(tangent, dealt)
    mean = compose(deltas)
    at_mean = [head_statistics(tangent, shard, mean, progress=False) for shard in dealt.shards]
    at_anchor = [head_statistics(tangent, shard, progress=False) for shard in dealt.shards]
    at_own = [
        head_statistics(tangent, shard, delta, progress=False)
        for shard, delta in zip(dealt.shards, deltas, strict=True)
    ]
    zeros = {name: torch.zeros_like(value) for name, value in mean.items()}
    found = {
        "mean": mean,
        "head, sums at the shards' own deltas": {**mean, **best_head(at_own)},
        "head, sums at the anchor": compose(deltas, how="head", statistics=at_anchor),
        "head, sums at the mean": compose(deltas, how="head", statistics=at_mean),
        "head alone": {**zeros, **best_head(at_anchor)},
    }
    result = {}
    for way, delta in found.items():
        tangent.load_delta_dict(delta)
        result[way] = score(tangent, dealt.tested)
    return result


def best_head(sums: list[TangentStatistics]) -> Delta:
    """The head's optimum on all, whatever delta each one's residuals are at."""
    same = sums[0].meta
    total = functools.reduce(
        operator.add,
        [TangentStatistics(same, s.terms, s.counts, s.reach, s.digests) for s in sums],
    )
    return total.choose().delta


def of_statistics(dealt: Dealt, public: CachedFeatures) -> float:
    """The score of statistics in a core of 256 directions and the head."""
    tangent = linearize(dealt.anchor, core=core_basis(dealt.anchor, public, size=8))
    sums = [statistics(tangent, shard, progress=False) for shard in dealt.shards]
    tangent.load_delta_dict(compose(sums, how="statistics"))
    return score(tangent, dealt.tested)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ways to compose shards of emoji.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/tangent-ops")
    given = parser.parse_args()
    context = Context(given.cache, (("emoji", (1,)),))
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in given.seeds:
        for dealing in ("iid", "by class"):
            for shards in given.shards:
                dealt = deal(context, {**SIZES, "seed": seed, "deal": dealing, "shards": shards})
                found = scores(dealt)
                if dealing == "iid" and shards == given.shards[0]:
                    # The same bits however the images are dealt.
                    prepared = context.prepared("emoji")
                    sizes = [SIZES["public"], SIZES["train"], SIZES["validation"]]
                    public = prepared.rows(1, prepared.drawn(seed, sizes)[0])
                    found["statistics"] = of_statistics(dealt, public)
                for way, value in found.items():
                    table[way][f"{shards} {dealing}"].append(100 * value)
                print(seed, dealing, shards, found, flush=True)
    for way, columns in table.items():
        cells = [
            f"{name}: {summary.mean(v):.1f} ± {summary.stdev(v) / len(v) ** 0.5:.1f}"
            for name, v in columns.items()
        ]
        print(f"{way:40}", *cells, sep=" | ")


if __name__ == "__main__":
    main()
