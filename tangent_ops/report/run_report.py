"""`collect`: all that a run's page shows, from its files and its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tangent_ops.composition.ledger import Event, Ledger, StatisticsLedger
from tangent_ops.delta import DeltaMeta
from tangent_ops.errors import (
    ArgumentError,
    LedgerError,
    SampleError,
    TangentOpsError,
    UnsupportedError,
)
from tangent_ops.report.cases import Case, Neighbour, cases
from tangent_ops.report.pictures import add_pictures, data_uri
from tangent_ops.report.scores import Scores, scores
from tangent_ops.report.shard_facts import ShardFacts, shard_facts
from tangent_ops.shards import ImageData, Plan, Samples, settled_ledger
from tangent_ops.shards.composing import ANCHOR

SHOWN = 40  # shards with pictures and a row each


@dataclass(frozen=True)
class RunReport:
    """What a run's page shows. A remark says in a sentence why a part is missing.

    Attributes:
        plan: the run.
        classes: names, by class index.
        shards: all of them, in their order.
        composed: how many shards the ledger has; None if it is not in line with the plan.
        data: where the labelled images are; None if there are none.
        samples: the labelled images.
        scores: predictions for them.
        cases: some of these predictions, traced back to training images.
        pictures: index of a labelled image -> data URI.
        events: what was added and forgotten, when, the newest first.
        privacy: the statement of all compositions, in words; "" if the fits are not private.
        remarks: part -> why it is missing: "composed", "pictures", "scores", "cases", "privacy".
    """

    plan: Plan
    classes: list[str]
    shards: list[ShardFacts]
    composed: int | None
    data: ImageData | None
    samples: Samples | None
    scores: Scores | None
    cases: list[Case]
    pictures: Mapping[int, str]
    events: list[Event]
    privacy: str
    remarks: Mapping[str, str]


def labelled_images(plan: Plan, data: ImageData) -> Samples:
    """Labelled images, prepared for a run's anchor, with its classes.

    Raises:
        ArgumentError: there is no such folder, or its classes are not the run's.
    """
    info = plan.anchor_info
    return data.open(info.input).with_classes(info.classes)


def collect(plan: Plan, data: ImageData | None = None, *, progress: bool = True) -> RunReport:
    """Collect what a report of a run shows. The run is not changed.

    Cost: a pass of the labelled images through each composition, and through the composition
    without each of up to 50 shards; and, for influences, a pass of up to 5,000 training images. An
    image that cannot be read leaves out what needs it, with a remark.

    Args:
        plan: the run.
        data: labelled images; None for the run's validation images, if it has any.
        progress: show bars.

    Raises:
        ArgumentError: there is no such folder, or its classes are not the run's.
        PlanError, LedgerError: a file of the run is damaged.
    """
    remarks: dict[str, str] = {}
    data, samples = _labelled(plan, data, remarks)
    ledger = None
    try:
        ledger = settled_ledger(plan)
    except LedgerError as error:
        remarks["composed"] = f"{error}."
    origins = ledger.origins() if isinstance(ledger, Ledger) else {}
    shards = shard_facts(plan, origins)
    classes = list(plan.anchor_info.classes)
    classes = classes or [str(k) for k in range(plan.anchor_info.options["num_classes"])]
    if plan.recipe.dp_epsilon is not None:
        remarks["pictures"] = "The fits are private, so this page shows no training image."
    elif remark := add_pictures(plan, shards[:SHOWN], progress):
        remarks["pictures"] = remark
    found = None
    if samples is not None:
        try:
            found = scores(plan, samples, composed=ledger is not None, progress=progress)
        except SampleError as error:
            remarks["scores"] = f"{error}."
    traced, pictures = _traced(plan, samples, found, remarks, progress)
    privacy = _privacy(plan, ledger, origins, remarks)
    return RunReport(
        plan=plan,
        classes=classes,
        shards=shards,
        composed=None if ledger is None else len(ledger),
        data=data,
        samples=samples,
        scores=found,
        cases=traced,
        pictures=pictures,
        events=_events(plan, ledger),
        privacy=privacy,
        remarks=remarks,
    )


def _labelled(
    plan: Plan, data: ImageData | None, remarks: dict[str, str]
) -> tuple[ImageData | None, Samples | None]:
    """The images given, or else the run's validation images, which may have gone since."""
    if data is not None:
        return data, labelled_images(plan, data)
    if plan.validation is None:
        remarks["scores"] = "No labelled images are known: give a folder of them by --data."
        return None, None
    try:
        return plan.validation, labelled_images(plan, plan.validation)
    except (ArgumentError, UnsupportedError) as error:
        remarks["scores"] = f"The run's validation images are not there: {error} (--data)."
        return None, None


def _traced(
    plan: Plan,
    samples: Samples | None,
    found: Scores | None,
    remarks: dict[str, str],
    progress: bool,
) -> tuple[list[Case], dict[int, str]]:
    """Influences with pictures, and pictures of the images that they are on."""
    if samples is None or found is None or found.main == ANCHOR:
        remarks["cases"] = "It needs labelled images, and a composed run."
        return [], {}
    try:
        traced = cases(plan, samples, found.models, progress)
        pictures = {case.index: data_uri(samples.image(case.index)) for case in traced}
        return [_with_pictures(plan, case) for case in traced], pictures
    except (TangentOpsError, ArithmeticError) as error:
        remarks["cases"] = f"{error}."
        return [], {}


def _with_pictures(plan: Plan, case: Case) -> Case:
    def drawn(neighbours: list[Neighbour]) -> list[Neighbour]:
        if not neighbours:
            return []
        ids, targets, contents = zip(
            *((n.sample.id, n.sample.target, n.sample.content) for n in neighbours), strict=True
        )
        there = plan.data.pick(ids, targets, contents, None)
        return [
            replace(one, picture=data_uri(there.image(index)))
            for index, one in enumerate(neighbours)
        ]

    return replace(case, helpful=drawn(case.helpful), harmful=drawn(case.harmful))


def _events(plan: Plan, ledger: Ledger | StatisticsLedger | None) -> list[Event]:
    """The plan's removals and the ledger's history in one list, the newest first."""
    removed = [
        Event(one.when, f"{one.samples} image{'s' * (one.samples != 1)} forgotten", one.shard)
        for one in plan.manifest.removed()
    ]
    events = removed + ([] if ledger is None else ledger.history())
    return sorted(events, key=lambda event: event.when, reverse=True)


def _privacy(
    plan: Plan,
    ledger: Ledger | StatisticsLedger | None,
    origins: Mapping[str, DeltaMeta | None],
    remarks: dict[str, str],
) -> str:
    if plan.recipe.dp_epsilon is None:
        return ""
    if not isinstance(ledger, Ledger) or not origins:
        remarks["privacy"] = "The statements are shown when the run is composed."
        return ""
    try:
        from tangent_ops.privacy.parallel_composition import ledger_privacy
    except ImportError as error:
        remarks["privacy"] = f"{error}."
        return ""
    try:
        return ledger_privacy(ledger).describe()
    except TangentOpsError as error:
        remarks["privacy"] = f"The statements do not hold: {error}."
        return ""
