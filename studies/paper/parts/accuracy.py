"""Accuracy: every way to fine-tune on every set, with each loss.

All of a cell's ways share its training images, its validation images, which choose their rates, and
the classifier that they start from: a probe of the training images.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from studies.paper.cells import Cell
from studies.paper.methods import METHODS, Fitted, Start, trained_parameters
from studies.paper.outcomes import outcome_of
from studies.paper.parts.context import Context, score
from studies.paper.tokens import Prepared
from studies.paper.tuning import choose
from tangent_ops.errors import NonFiniteLossError
from tangent_ops.profiling.memory import peak_bytes

PART = "accuracy"
LOSSES = ("square", "cross-entropy")
COSTS = "costs"  # in place of a loss


@dataclass(frozen=True)
class Regime:
    """Images, passes, and the methods that run with them.

    Attributes:
        name: What the page calls it.
        train: Training images of a seed.
        validation: Images of a seed that its rates are chosen on.
        epochs: Passes over the training images.
        batch: Images of a step.
        square: Methods with the square loss, in `studies.paper.methods.METHODS`.
        entropy: Those with cross-entropy.
        sets: That it runs on; empty for all of the part's.
    """

    name: str
    train: int
    validation: int
    epochs: int
    batch: int
    square: tuple[str, ...]
    entropy: tuple[str, ...]
    sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Of this part.

    Attributes:
        sets: In `studies.paper.data.sets.SETS`; costs are measured on the first of a regime's.
        regimes: What runs on them.
    """

    sets: tuple[str, ...]
    regimes: tuple[Regime, ...]


def plan(sizes: Sizes, seeds: Sequence[int]) -> Iterator[Cell]:
    """A cell to each regime, set, seed and loss; and one of costs to each regime."""
    for regime in sizes.regimes:
        given = {"regime": regime.name, "train": regime.train, "validation": regime.validation}
        given |= {"epochs": regime.epochs, "batch": regime.batch}
        sets = regime.sets or sizes.sets
        for images in sets:
            for seed in seeds:
                for loss, methods in zip(LOSSES, (regime.square, regime.entropy), strict=True):
                    about = {"images": images, "seed": seed, "loss": loss}
                    yield Cell(PART, {**about, **given, "methods": list(methods)})
        methods = list(dict.fromkeys((*regime.square, *regime.entropy)))
        about = {"images": sets[0], "seed": seeds[0], "loss": COSTS}
        losses = ["square" if name in regime.square else "cross-entropy" for name in methods]
        yield Cell(PART, {**about, **given, "methods": methods, "losses": losses})


def run(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """All ways of a cell, or what they cost."""
    prepared = context.prepared(arguments["images"])
    sizes = [arguments["train"], arguments["validation"]]
    rows, validation = prepared.drawn(arguments["seed"], sizes)
    if arguments["loss"] == COSTS:
        each = zip(arguments["methods"], arguments["losses"], strict=True)
        starts = {name: _start(arguments, context, prepared, rows, name, x) for name, x in each}
        return {"costs": {name: _cost(name, start) for name, start in starts.items()}}
    ways, choices = {}, {}
    known: dict[int, Start] = {}
    for name in arguments["methods"]:
        depth = METHODS[name].depth
        if depth not in known:
            given = (arguments, context, prepared, rows, name, arguments["loss"])
            known[depth] = _start(*given)
        tuned = _tuned(name, known[depth], prepared, validation)
        ways[name], choices[METHODS[name].title] = tuned
    return {"ways": ways, "choices": choices}


def _start(
    arguments: dict[str, Any],
    context: Context,
    prepared: Prepared,
    rows: Tensor,
    name: str,
    loss: str,
) -> Start:
    depth, seed = METHODS[name].depth, arguments["seed"]
    tail = context.anchor(arguments["images"], rows, loss, seed, max(depth, 1))
    sizes = (arguments["epochs"], arguments["batch"])
    return Start(tail, prepared.rows(depth, rows), loss, seed, *sizes)


def _tuned(
    name: str, start: Start, prepared: Prepared, validation: Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The method at the rate that validation images prefer: its outcomes, and how it was chosen."""
    method = METHODS[name]
    judge = prepared.rows(method.depth, validation)
    fit = method.prepare(start)

    def make(rate: float) -> tuple[float, Fitted | None]:
        try:
            fitted = fit(rate)
        except NonFiniteLossError:  # a rate that diverges is the worst
            return 0.0, None
        return score(fitted.model, judge), fitted

    choice = choose(method.grid, make)
    fitted = choice.result
    assert fitted is not None  # then every rate diverged
    way = {"validation": choice.tried[choice.value], "told": fitted.told}
    way["test"] = outcome_of(fitted.model, prepared.tested(method.depth))
    if prepared.shifted:
        way["shifted"] = outcome_of(fitted.model, prepared.tested_shifted(method.depth))
    return way, choice.told()


def _cost(name: str, start: Start) -> dict[str, Any]:
    """Of one fit at the middle rate: its time, and torch's most memory in one of a single pass."""
    method = METHODS[name]
    rate = method.grid[len(method.grid) // 2]

    def fitted(epochs: int) -> Fitted:
        # A copy of the anchor: nothing is shared with the methods before.
        tail = copy.deepcopy(start.tail)
        return method.prepare(
            Start(tail, start.train, start.loss, start.seed, epochs, start.batch)
        )(rate)

    began = time.perf_counter()
    model = fitted(start.epochs).model
    seconds = time.perf_counter() - began
    device = next(model.parameters()).device
    peak = peak_bytes(lambda: fitted(1), device)
    numbers = trained_parameters(model)
    return {"loss": start.loss, "numbers": numbers, "seconds": seconds, "bytes": peak}
