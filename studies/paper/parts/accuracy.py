"""Part 2: every method on every set, at the rate that was best on validation images of seed 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from studies.paper.cells import Cell, Found
from studies.paper.methods import METHODS, PROBE_RATE, Start, probe, train
from studies.paper.parts.context import Context, score
from studies.paper.presets import Preset
from studies.paper.tokens import FEATURES
from tangent_ops.profiling.memory import peak_bytes

PART = "accuracy"
MEMORY = "memory"
PROBE = "probe"
PROBE_RATES = (3e-3, PROBE_RATE)
MEMORY_SAMPLES = 32
TUNED_ON = 0  # the seed


def plan(preset: Preset, found: Found) -> Iterator[Cell]:
    """Each rate on the first seed; the best of them on the others; memory, once to a method."""
    part = preset.accuracy
    for images in part.sets:
        for method, loss in _runs(preset, images):
            given = {"images": images, "method": method, "loss": loss}
            epochs = part.slow_epochs if method in part.slow else part.epochs
            sizes = {"train": part.train, "validation": part.validation, "epochs": epochs}
            rates = PROBE_RATES if method == PROBE else METHODS[method].rates
            for rate in rates:
                yield Cell(PART, {**given, "seed": TUNED_ON, "rate": rate, **sizes})
            best = chosen(found, len(rates), **given)
            if best is not None:
                for seed in preset.seeds:
                    yield Cell(PART, {**given, "seed": seed, "rate": best["rate"], **sizes})
    measured = part.slow_sets[0] if part.slow_sets else part.sets[0]
    for method, loss in _runs(preset, measured):
        if method != PROBE:
            given = {"images": measured, "method": method, "loss": loss}
            yield Cell(MEMORY, {**given, "samples": MEMORY_SAMPLES})


def chosen(found: Found, rates: int, **given: Any) -> dict[str, Any] | None:
    """The run of the first seed that was best on validation images; None if one is missing."""
    tried = found.of(PART, seed=TUNED_ON, **given)
    if len(tried) < rates:
        return None
    return max(tried, key=lambda cell: (cell["validation_accuracy"], -cell["rate"]))


def run(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """Train one model and score it."""
    prepared = context.prepared(arguments["images"])
    sizes = [arguments["train"], arguments["validation"]]
    rows, validation = prepared.drawn(arguments["seed"], sizes)
    loss, seed, name = arguments["loss"], arguments["seed"], arguments["method"]
    if name == PROBE:
        depth = FEATURES
        classes = len(prepared.classes)
        model: Any = probe(prepared.rows(depth, rows), classes, loss, seed, arguments["rate"])
        trained = {"parameters": sum(p.numel() for p in model.parameters()), "seconds": 0.0}
    else:
        method = METHODS[name]
        depth = method.depth
        anchor = context.anchor(arguments["images"], rows, loss, seed, depth)
        start = Start(anchor, prepared.rows(depth, rows), loss, seed, arguments["epochs"])
        result = train(method, start, arguments["rate"])
        model = result.model
        trained = {"parameters": result.parameters, "seconds": result.seconds}
    scores = {
        "validation_accuracy": score(model, prepared.rows(depth, validation)),
        "test_accuracy": score(model, prepared.tested(depth)),
    }
    if prepared.shifted:
        scores["shifted_accuracy"] = score(model, prepared.tested_shifted(depth))
    return {**trained, **scores}


def run_memory(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """The most that torch holds while a method trains for one pass over one batch."""
    prepared = context.prepared(arguments["images"])
    (rows,) = prepared.drawn(TUNED_ON, [arguments["samples"]])
    method, loss = METHODS[arguments["method"]], arguments["loss"]
    anchor = context.anchor(arguments["images"], rows, loss, TUNED_ON, method.depth)
    start = Start(anchor, prepared.rows(method.depth, rows), loss, TUNED_ON, epochs=1)
    train(method, start, method.rates[-1])
    return {"bytes": peak_bytes(lambda: train(method, start, method.rates[-1]), context.device)}


def _runs(preset: Preset, images: str) -> Iterator[tuple[str, str]]:
    part = preset.accuracy
    for loss in ("square", "cross-entropy"):
        yield PROBE, loss
        for method in part.methods:
            yield method, loss
    slow = part.slow if images in part.slow_sets else ()
    for method in slow:
        yield method, "square"
