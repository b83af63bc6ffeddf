"""What the plan, the results' headers and the histories say about each shard; reads no image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tangent_ops.delta import DeltaMeta
from tangent_ops.errors import ArgumentError
from tangent_ops.exact import Certificate
from tangent_ops.shards import Plan
from tangent_ops.shards.history import ShardHistory, read_history
from tangent_ops.shards.manifest import Sample

CERTIFICATE = "certificate"  # in DeltaMeta.extra


@dataclass(frozen=True)
class ShardFacts:
    """A shard of a run.

    Attributes:
        name: its name.
        samples: its samples, by id.
        classes: class index -> number of its images.
        done: whether its delta, or statistics, exist.
        file: of these, below the run's folder; "" if it has no sample.
        history: of its training; None if none was recorded.
        certificate: of its delta; None if none was recorded.
        pictures: some of its images as data URIs, with their samples; `add_pictures` adds them.
    """

    name: str
    samples: tuple[Sample, ...]
    classes: Mapping[int, int]
    done: bool
    file: str
    history: ShardHistory | None = None
    certificate: Certificate | None = None
    pictures: list[tuple[Sample, str]] = field(default_factory=list)


def shard_facts(plan: Plan, origins: Mapping[str, DeltaMeta | None]) -> list[ShardFacts]:
    """All shards, in their order.

    Args:
        plan: the run.
        origins: name of a shard -> the meta of its delta, where it has one.

    Raises:
        PlanError: the plan is damaged.
    """
    found = []
    for shard, (name, samples) in zip(plan.shards(), plan.manifest.samples(), strict=True):
        meta = origins.get(name)
        path = None if shard.job is None else plan.result_path(shard.job)
        found.append(
            ShardFacts(
                name=name,
                samples=tuple(samples),
                classes=Counter(sample.target for sample in samples),
                done=shard.done,
                file="" if path is None else str(path.relative_to(plan.path)),
                history=None if shard.job is None else read_history(plan, shard.job),
                certificate=None if meta is None else _certificate(meta),
            )
        )
    return found


def _certificate(meta: DeltaMeta) -> Certificate | None:
    text = meta.extra.get(CERTIFICATE)
    try:
        return None if text is None else Certificate.from_json(text)
    except ArgumentError:  # of another release
        return None
