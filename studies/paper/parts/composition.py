"""Part 3: shards trained apart and composed, against training on all of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

from studies.paper.cells import Cell, Found
from studies.paper.parts.context import Context, hits, logits_of, score
from studies.paper.parts.dealing import (
    Dealt,
    deal,
    fit_ordinary,
    fit_shards,
    mean_logits,
    reset,
)
from studies.paper.presets import Preset
from tangent_ops import compose, compose_lossless, fit_exact, linearize
from tangent_ops.composition.soups import uniform_soup
from tangent_ops.errors import NotConvergedWarning
from tangent_ops.exact import ShardCurvature

PART = "composition"
TUNED_ON = 0
RATES = {
    "tangent": (1e-4, 3e-4),
    "ordinary": (1e-4, 3e-4),
    "exact": (10.0,),
}
TUNED_BY = {"tangent": "mean", "ordinary": "soup", "exact": "lossless"}  # whose validation counts
FIT_TOLERANCE, COMPOSE_TOLERANCE = 0.1, 1e-2
SMALL = 64  # images up to which a shard is solved by its kernel matrix


def plan(preset: Preset, found: Found) -> Iterator[Cell]:
    """Each rate on the first seed, for every number of shards; the best on the others."""
    part = preset.composition
    for images in part.sets:
        for way, rates in RATES.items():
            train = part.exact_train if way == "exact" else part.train
            sizes = {"public": part.public, "train": train, "validation": part.validation}
            sizes["epochs"] = part.epochs
            for dealt in part.deals:
                for shards in _shards(preset, way, dealt):
                    if shards == 1 and dealt != part.deals[0]:
                        continue  # one shard is one shard
                    given = {"images": images, "way": way, "deal": dealt, "shards": shards}
                    for rate in rates:
                        yield Cell(PART, {**given, "seed": TUNED_ON, "rate": rate, **sizes})
                    best = chosen(found, **given)
                    if best is not None:
                        for seed in preset.seeds:
                            yield Cell(PART, {**given, "seed": seed, "rate": best["rate"], **sizes})


def chosen(found: Found, *, way: str, **given: Any) -> dict[str, Any] | None:
    """The run of the first seed that was best on validation images; None if one is missing."""
    tried = found.of(PART, seed=TUNED_ON, way=way, **given)
    if len(tried) < len(RATES[way]):
        return None
    by = f"{TUNED_BY[way]}_validation"
    return max(tried, key=lambda cell: (cell[by], -cell["rate"]))


def _shards(preset: Preset, way: str, dealt: str) -> tuple[int, ...]:
    part = preset.composition
    if way != "exact":
        return part.shards
    return part.exact_by_class if dealt == "by class" else part.exact


def run(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """Train the shards one way, and score every composition of them."""
    dealt = deal(context, arguments)
    ways = {"tangent": _tangent, "ordinary": _ordinary, "exact": _exact}
    scores = ways[arguments["way"]](dealt, arguments)
    return {"anchor": score(dealt.anchor, dealt.tested), **scores}


def _tangent(dealt: Dealt, arguments: dict[str, Any]) -> dict[str, Any]:
    tangent = linearize(dealt.anchor)
    began = time.perf_counter()
    options = (arguments["rate"], arguments["epochs"], arguments["seed"])
    deltas = fit_shards(tangent, dealt.shards, *options)
    seconds = time.perf_counter() - began
    found: dict[str, Any] = {"fit_seconds": seconds}
    tangent.load_delta_dict(deltas[0])
    found["first_shard"] = score(tangent, dealt.tested)
    _score(found, "mean", tangent, compose(deltas), dealt)
    data = {"tangent": tangent, "data": dealt.validation}
    _score(found, "least_squares", tangent, compose(deltas, "least-squares", **data), dealt)
    return found


def _ordinary(dealt: Dealt, arguments: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    options = (arguments["rate"], arguments["epochs"], arguments["seed"])
    models = fit_ordinary(dealt.anchor, dealt.shards, *options)
    found: dict[str, Any] = {"fit_seconds": time.perf_counter() - began}
    found["first_shard"] = score(models[0], dealt.tested)
    for name, data in (("", dealt.tested), ("_validation", dealt.validation)):
        logits = mean_logits([logits_of(model, data) for model in models])
        found[f"ensemble{name}"] = hits(logits, data.targets)
    soup = models[0]
    soup.load_state_dict(uniform_soup(models))
    found["soup"] = score(soup, dealt.tested)
    found["soup_validation"] = score(soup, dealt.validation)
    return found


def _exact(dealt: Dealt, arguments: dict[str, Any]) -> dict[str, Any]:
    tangent, l2 = linearize(dealt.anchor), arguments["rate"]
    began = time.perf_counter()
    deltas = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotConvergedWarning)
        for shard in dealt.shards:
            reset(tangent)
            method = "dual" if len(shard) <= SMALL else "cg"
            options: dict[str, Any] = {"method": method, "rank": 16, "progress": False}
            fit_exact(tangent, shard, l2, FIT_TOLERANCE, **options)
            deltas.append(tangent.delta_dict())
    found: dict[str, Any] = {"fit_seconds": time.perf_counter() - began}
    _score(found, "mean", tangent, compose(deltas), dealt)
    began = time.perf_counter()
    if len(deltas) == 1:
        lossless = deltas[0]
    else:
        curvatures = [ShardCurvature(tangent, shard, l2, progress=False) for shard in dealt.shards]
        lossless = compose_lossless(deltas, curvatures, COMPOSE_TOLERANCE, progress=False)
    found["compose_seconds"] = time.perf_counter() - began
    _score(found, "lossless", tangent, lossless, dealt)
    return found


def _score(found: dict[str, Any], name: str, tangent: Any, delta: Any, dealt: Dealt) -> None:
    tangent.load_delta_dict(delta)
    found[name] = score(tangent, dealt.tested)
    found[f"{name}_validation"] = score(tangent, dealt.validation)
