"""What a run's models predict for labelled images, also without each of its shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tqdm import tqdm

from tangent_ops.composition.ledger import Ledger, StatisticsLedger
from tangent_ops.delta import Delta
from tangent_ops.errors import StatisticsError
from tangent_ops.shards import Plan, Samples, compositions, settled_ledger
from tangent_ops.shards.composing import ANCHOR, default_how
from tangent_ops.shards.job import device
from tangent_ops.shards.scoring import Predictions, predictions

LEFT_OUT = 50  # shards, at most, that are left out in turn
_BYTES = 1 << 30  # of deltas that are in memory at a time


@dataclass(frozen=True)
class Scores:
    """Predictions of a run's models.

    Attributes:
        models: of the anchor and each composition, by name.
        main: the name of the run's own composition; "anchor" if it has none.
        without: the same images by the composition without a shard, by the shard's name; None if
            nothing is left without one, or nothing is composed.
        largest: whether `without` has only the largest shards, because there are too many.
    """

    models: Predictions
    main: str
    without: Predictions | None
    largest: bool = False

    @property
    def joint(self) -> Predictions:
        """`without`, and the main model's predictions under the name ""."""
        assert self.without is not None
        main = {"": self.models.classes[self.main]}
        return replace(self.without, classes=main | self.without.classes)


def scores(plan: Plan, data: Samples, *, composed: bool, progress: bool = True) -> Scores:
    """Predict the classes of labelled images by all models of a run.

    Args:
        plan: the run.
        data: labelled images, prepared for the anchor, with the anchor's classes.
        composed: whether the run is settled; otherwise only the anchor predicts.
        progress: show bars.

    Raises:
        SampleError: an image cannot be read.
        LedgerError, PlanError: a file of the run is damaged, or of other shards.
    """
    tangent = plan.tangent().to(device())
    deltas = compositions(plan) if composed else {ANCHOR: None}
    how = default_how(plan)
    main = how if how in deltas else ANCHOR
    models = predictions(tangent, deltas, data, progress=progress)
    if main == ANCHOR:
        return Scores(models, main, None)
    ledger = settled_ledger(plan)
    names = _largest(plan, ledger)
    without: Predictions | None = None
    for some in _in_memory(_without(plan, ledger, names, progress)):
        found = predictions(tangent, some, data, progress=progress)
        before = {} if without is None else without.classes
        without = replace(found, classes={**before, **found.classes})
    return Scores(models, main, without, largest=len(names) < len(ledger))


def _largest(plan: Plan, ledger: Ledger | StatisticsLedger) -> list[str]:
    """The names of the largest shards in the ledger, in the plan's order."""
    there = [shard for shard in plan.shards() if shard.name in ledger]
    if len(there) < 2:
        return []
    chosen = sorted(there, key=lambda shard: -shard.samples)[:LEFT_OUT]
    return [shard.name for shard in there if shard in chosen]


def _without(
    plan: Plan, ledger: Ledger | StatisticsLedger, names: list[str], progress: bool
) -> Iterator[tuple[str, Delta]]:
    """The composition without each shard, where what is left determines one."""
    bar = tqdm(names, "without", unit="shard", delay=2, leave=False, disable=not progress)
    for name in bar:
        if isinstance(ledger, Ledger):
            yield name, ledger.composed(without=name)
            continue
        left = ledger.statistics(without=name)
        try:
            yield name, left.choose().delta if plan.l2 is None else left.solve(plan.l2)
        except StatisticsError:
            continue


def _in_memory(deltas: Iterator[tuple[str, Delta]]) -> Iterator[dict[str, Delta]]:
    some: dict[str, Delta] = {}
    size = 0
    for name, delta in deltas:
        some[name] = delta
        size += sum(value.nbytes for value in delta.values())
        if size >= _BYTES:
            yield some
            some, size = {}, 0
    if some:
        yield some
