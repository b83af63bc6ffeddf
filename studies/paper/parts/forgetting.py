"""Forgetting: accuracy as shards are removed, and after requests of single images, with their cost.

What is removed leaves exactly: every model here is one that never had it. The ways differ in how
accurate that model is, and in what a request costs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from studies.paper.cells import Cell
from studies.paper.methods import LOSSES
from studies.paper.outcomes import hits, logits_of, outcome, outcome_of
from studies.paper.parts.context import Context, score
from studies.paper.parts.dealing import LOSS, Dealt, batch_of, deal, fit_ordinary, mean_logits
from studies.paper.span import Span
from studies.paper.tuning import choose
from tangent_ops import (
    CachedFeatures,
    Ledger,
    LinearizedModel,
    StatisticsLedger,
    core_basis,
    fit,
    linearize,
    statistics,
)
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.delta import Delta
from tangent_ops.exact import forget_samples

PART = "forgetting"
MEANS, AGAIN, EXACT = "tangent mean", "tangent again", "exact"
SUMS, ENSEMBLE, ORDINARY = "statistics", "ensemble", "ordinary again"
CORE, CORE_IMAGES = 8, 50  # directions on either side of a layer, and what they come from
DIVERGED = -1.0  # below any accuracy
RATES = {
    MEANS: (3e-5, 1e-4, 3e-4),  # finer ones end where a shard of fewer images diverges
    AGAIN: (5e-5, 1e-4, 2e-4),
    EXACT: (0.3, 1.0, 3.0),  # of l2
    ENSEMBLE: (3e-5, 1e-4, 3e-4),
    ORDINARY: (3e-5, 1e-4, 3e-4),
}


@dataclass(frozen=True)
class Sizes:
    """Of this part.

    Attributes:
        images: The set.
        public: Images of the anchor's classifier and of the core, in no shard.
        train: Private images.
        validation: Images that rates are chosen on.
        shards: Of the private images.
        removed: How many of them are removed, one number to a point of the curve; from 0.
        requests: How many images are asked to be forgotten; ascending. None may take a whole shard,
            which is then forgotten, not trained again.
        epochs: Passes over the images.
    """

    images: str = "emoji"
    public: int = 100
    train: int = 800
    validation: int = 200
    shards: int = 10
    removed: tuple[int, ...] = (0, 1, 2, 5, 8, 9)
    requests: tuple[int, ...] = (1, 10, 100)
    epochs: int = 5


def plan(sizes: Sizes, seeds: Sequence[int]) -> Iterator[Cell]:
    """A cell to each seed and group of ways."""
    given = {name: [*v] if isinstance(v, tuple) else v for name, v in asdict(sizes).items()}
    for seed in seeds:
        for group in GROUPS:
            yield Cell(PART, {**given, "seed": seed, "group": group})


@dataclass(frozen=True)
class Task:
    """What every way is asked for.

    Attributes:
        dealt: The private images, in the order of their shards.
        parts: Of each shard, the indices of its private images.
        removed: Of each point of the curve, how many shards are gone.
        requests: The indices of the images of each request; each holds the one before.
        epochs: Passes.
        seed: Of the order of the samples.
    """

    dealt: Dealt
    parts: tuple[Tensor, ...]
    removed: Sequence[int]
    requests: list[Tensor]
    epochs: int
    seed: int

    @classmethod
    def of(cls, arguments: dict[str, Any], context: Context) -> Task:
        """The task of a cell."""
        count, seed = arguments["train"], arguments["seed"]
        parts = torch.arange(count).tensor_split(arguments["shards"])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        requests = [order[:size] for size in arguments["requests"]]
        rest = (arguments["removed"], requests, arguments["epochs"], seed)
        return cls(deal(context, arguments), parts, *rest)

    def left(self, removed: int) -> Tensor:
        """The indices of the shards that are left when the first ones are removed."""
        return torch.cat(self.parts[removed:])

    def some(self, indices: Tensor) -> CachedFeatures:
        """Some of the private images."""
        private = self.dealt.private
        return CachedFeatures(private.features[indices], private.targets[indices])

    def touched(self, gone: Tensor) -> dict[int, Tensor]:
        """Shard -> the indices that it keeps, for the shards that a request takes images from."""
        kept = {number: without(part, gone) for number, part in enumerate(self.parts)}
        return {n: indices for n, indices in kept.items() if len(indices) < len(self.parts[n])}


def run(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """Of each way of a group: outcomes of the curve and of requests, seconds and bytes."""
    return GROUPS[arguments["group"]](Task.of(arguments, context))


def without(indices: Tensor, gone: Tensor) -> Tensor:
    """Those that are not gone, in their order."""
    return indices[~torch.isin(indices, gone)]


def run_tangent(task: Task) -> dict[str, Any]:
    """The ledger of means, descent again, and the exact fit again."""
    tangent = linearize(task.dealt.anchor)
    span, loss = Span(tangent, task.dealt.private), LOSSES[LOSS]()

    def descend(indices: Tensor, lr: float) -> Tensor:
        options: dict[str, Any] = {"batch": batch_of(len(indices)), "seed": task.seed}
        return span.descend(indices, loss, lr=lr, epochs=task.epochs, **options)

    def tried(weights: Tensor) -> tuple[float, Tensor]:
        return validated(tangent, span.delta(weights), task.dealt.validation), weights

    def outcome_at(weights: Tensor) -> dict[str, Any]:
        return outcome_of(loaded(tangent, span.delta(weights)), task.dealt.tested)

    def mean(lr: float) -> tuple[float, list[Tensor]]:
        shards = [descend(part, lr) for part in task.parts]
        return tried(sum(shards[1:], shards[0]) / len(shards))[0], shards

    every = task.left(0)
    means = choose(RATES[MEANS], mean)
    again = choose(RATES[AGAIN], lambda lr: tried(descend(every, lr)))
    exact = choose(RATES[EXACT], lambda l2: tried(span.solve(every, l2)))
    deltas = [span.delta(weights) for weights in means.result]
    _, shard_seconds = timed(lambda: _fit(tangent, task, means.value))

    def at(removed: int) -> tuple[Tensor, Tensor]:
        if not removed:
            return again.result, exact.result
        left = task.left(removed)
        return descend(left, again.value), span.solve(left, exact.value)

    curve = [[outcome_at(weights) for weights in at(removed)] for removed in task.removed]
    ways: dict[str, Any] = {
        MEANS: {"removed": [], "requests": [], "shard_seconds": shard_seconds},
        AGAIN: {"removed": [point[0] for point in curve]},
        EXACT: {"removed": [point[1] for point in curve], "requests": []},
    }
    with tempfile.TemporaryDirectory() as folder:
        ledger = _ledger(tangent, deltas, Path(folder) / "curve")
        ways[MEANS]["bytes"] = size_of(Path(folder))
        for removed in task.removed:
            for number in range(len(task.parts) - len(ledger.list()), removed):
                ledger.forget(f"shard-{number}", progress=False)
            model = loaded(tangent, ledger.composed())
            ways[MEANS]["removed"].append(outcome_of(model, task.dealt.tested))
        for gone in task.requests:
            new = {
                n: span.delta(descend(kept, means.value)) for n, kept in task.touched(gone).items()
            }
            ledger = _ledger(tangent, deltas, Path(folder) / f"{len(gone)}")
            _, seconds = timed(lambda ledger=ledger, new=new: _replace(ledger, new, tangent))
            seconds += shard_seconds * len(new)  # Span's descents are for this study alone
            ways[MEANS]["requests"].append(asked(tangent, task, gone, seconds))
    problem = span.problem.with_l2(exact.value)
    for gone in task.requests:
        loaded(tangent, span.delta(exact.result))
        (_, certificate), seconds = timed(lambda gone=gone: forget_samples(problem, gone.tolist()))
        told = asked(tangent, task, gone, seconds)
        ways[EXACT]["requests"].append({**told, "bound": certificate.distance_bound})
    ways[EXACT]["bytes"] = sum(batch.nbytes for batch, _ in problem.system.batches())
    ways[EXACT]["norm"] = float(problem.flat().norm())
    choices = {MEANS: means.told(), AGAIN: again.told(), EXACT: exact.told()}
    return {
        "ways": ways,
        "choices": choices,
        "anchor": outcome_of(task.dealt.anchor, task.dealt.tested),
    }


def run_ordinary(task: Task) -> dict[str, Any]:
    """An ensemble with a model to each shard (SISA), and training again on what is left.

    Source: Bourtoule et al., "Machine Unlearning", IEEE S&P 2021 (arXiv:1912.03817).
    """
    dealt = task.dealt

    def train(indices: Tensor, lr: float) -> nn.Module:
        return fit_ordinary(dealt.anchor, [task.some(indices)], lr, task.epochs, task.seed)[0]

    def together(lr: float) -> tuple[float, list[nn.Module]]:
        models = [train(part, lr) for part in task.parts]
        logits = mean_logits([logits_of(model, dealt.validation) for model in models])
        return hits(logits, dealt.validation.targets), models

    def joint(lr: float) -> tuple[float, nn.Module]:
        model = train(task.left(0), lr)
        return score(model, dealt.validation), model

    ensemble, again = choose(RATES[ENSEMBLE], together), choose(RATES[ORDINARY], joint)
    logits = [logits_of(model, dealt.tested) for model in ensemble.result]

    def told(models: list[Tensor]) -> dict[str, Any]:
        return outcome(mean_logits(models), dealt.tested.targets)

    def of_ensemble(gone: Tensor) -> dict[str, Any]:
        touched = task.touched(gone)
        new, seconds = timed(lambda: {n: train(i, ensemble.value) for n, i in touched.items()})
        changed = {n: logits_of(model, dealt.tested) for n, model in new.items()}
        found = told([changed.get(n, old) for n, old in enumerate(logits)])
        return {"asked": len(gone), "outcome": found, "seconds": seconds}

    def of_joint(gone: Tensor) -> dict[str, Any]:
        model, seconds = timed(lambda: train(without(task.left(0), gone), again.value))
        return asked(model, task, gone, seconds)

    def at(removed: int) -> nn.Module:
        return train(task.left(removed), again.value) if removed else again.result

    size = sum(value.nbytes for value in again.result.state_dict().values())
    ways = {
        ENSEMBLE: {
            "removed": [told(logits[removed:]) for removed in task.removed],
            "requests": [of_ensemble(gone) for gone in task.requests],
            "bytes": size * len(task.parts),
        },
        ORDINARY: {
            "removed": [outcome_of(at(removed), dealt.tested) for removed in task.removed],
            "requests": [of_joint(gone) for gone in task.requests],
            "bytes": size,
        },
    }
    return {"ways": ways, "choices": {ENSEMBLE: ensemble.told(), ORDINARY: again.told()}}


def run_statistics(task: Task) -> dict[str, Any]:
    """Statistics in a core of the public images: what is asked for is subtracted.

    Raises:
        AssertionError: What is left is not, bit for bit, the sums of images that were never asked
            for, computed from those alone.
    """
    dealt = task.dealt
    public = dealt.public
    some = CachedFeatures(public.features[:CORE_IMAGES], public.targets[:CORE_IMAGES])
    tangent = linearize(dealt.anchor, core=core_basis(dealt.anchor, some, size=CORE))

    def sums(indices: Tensor) -> TangentStatistics:
        return statistics(tangent, task.some(indices), progress=False)

    each = [sums(part) for part in task.parts]
    way: dict[str, Any] = {"removed": [], "requests": []}
    with tempfile.TemporaryDirectory() as folder:

        def kept(name: str) -> StatisticsLedger:
            ledger = StatisticsLedger(Path(folder) / name, anchor=tangent)
            for number, shard in enumerate(each):
                ledger.add(f"shard-{number}", shard)
            return ledger

        ledger = kept("curve")
        way["bytes"] = size_of(Path(folder))
        for removed in task.removed:
            for number in range(len(each) - len(ledger.list()), removed):
                ledger.forget(f"shard-{number}", progress=False)
            assert ledger.statistics() == sum(each[removed + 1 :], each[removed])
            model = loaded(tangent, ledger.choose().delta)
            way["removed"].append(outcome_of(model, dealt.tested))
        most = task.requests[-1]
        never = sums(without(task.left(0), most))
        for gone in task.requests:
            ledger = kept(f"{len(gone)}")
            _, seconds = timed(
                lambda gone=gone, ledger=ledger: _subtract(ledger, task, tangent, gone)
            )
            spared = without(most, gone)
            assert ledger.statistics() == (never + sums(spared) if len(spared) else never)
            way["requests"].append(asked(tangent, task, gone, seconds))
    return {"ways": {SUMS: way}, "choices": {}}


GROUPS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "tangent": run_tangent,
    "ordinary": run_ordinary,
    "statistics": run_statistics,
}


def asked(model: nn.Module, task: Task, gone: Tensor, seconds: float) -> dict[str, Any]:
    """A request's result."""
    found = outcome_of(model, task.dealt.tested)
    return {"asked": len(gone), "outcome": found, "seconds": seconds}


def loaded(tangent: LinearizedModel, delta: Delta) -> LinearizedModel:
    """The model with that delta."""
    tangent.load_delta_dict(delta)
    return tangent


def validated(tangent: LinearizedModel, delta: Delta, data: CachedFeatures) -> float:
    """The delta's accuracy, or what is worse than any if training diverged."""
    if not all(bool(value.isfinite().all()) for value in delta.values()):
        return DIVERGED
    return score(loaded(tangent, delta), data)


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and the processor's seconds: other processes do not count."""
    began = time.process_time()
    found = call()
    return found, time.process_time() - began


def _fit(tangent: LinearizedModel, task: Task, lr: float) -> None:
    """A shard's training as users run it, by passes through the model."""
    shard = task.dealt.shards[0]
    tangent.zero_()
    options: dict[str, Any] = {"epochs": task.epochs, "lr": lr, "batch_size": batch_of(len(shard))}
    fit(tangent, shard, loss=LOSSES[LOSS](), optimizer="momentum", progress=False, **options)


def _ledger(tangent: LinearizedModel, deltas: Sequence[Delta], folder: Path) -> Ledger:
    ledger = Ledger(folder, anchor=tangent)
    for number, delta in enumerate(deltas):
        ledger.add(f"shard-{number}", delta)
    return ledger


def _replace(ledger: Ledger, new: dict[int, Delta], tangent: LinearizedModel) -> None:
    for number, delta in new.items():
        ledger.forget(f"shard-{number}", progress=False)
        ledger.add(f"shard-{number}", delta)
    loaded(tangent, ledger.composed())


def _subtract(ledger: StatisticsLedger, task: Task, tangent: LinearizedModel, gone: Tensor) -> None:
    for number in task.touched(gone):
        part = task.parts[number]
        own = task.some(part[torch.isin(part, gone)])
        ledger.forget_samples(f"shard-{number}", statistics(tangent, own, progress=False))
    loaded(tangent, ledger.choose().delta)
