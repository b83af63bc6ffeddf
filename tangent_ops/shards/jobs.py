"""Shards, their jobs, and the hash of what determines a job's result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from tangent_ops.files import to_json
from tangent_ops.shards.anchor import AnchorInfo
from tangent_ops.shards.manifest import Sample
from tangent_ops.shards.recipe import ShardRecipe


@dataclass(frozen=True)
class Shard:
    """A part of the data.

    Attributes:
        name: of your choice.
        samples: how many.
        job: hash of all that determines its delta or statistics, in hexadecimal; None if it has no
            samples.
        done: whether that result exists.
    """

    name: str
    samples: int
    job: str | None
    done: bool


@dataclass(frozen=True)
class Job:
    """What a worker trains."""

    shard: str
    hash: str
    samples: tuple[Sample, ...]


def job_hash(
    shard: str,
    samples: Iterable[Sample],
    anchor: AnchorInfo,
    recipe: ShardRecipe,
    basis: str | None = None,
) -> str:
    """SHA-256 of what determines a shard's delta or statistics, in hexadecimal.

    Args:
        shard: its name.
        samples: its samples.
        anchor: of the run.
        recipe: of the run.
        basis: fingerprint of the run's core basis, if it has one.
    """
    head = {
        "format": 1,
        "anchor": anchor.fingerprint,
        "input": anchor.input,
        "recipe": recipe.to_dict(),
        "shard": shard,
        **({} if basis is None else {"basis": basis}),
    }
    digest = hashlib.sha256(to_json(head).encode() + b"\n")
    for sample in samples:
        digest.update(to_json([sample.id, sample.target, sample.content]).encode() + b"\n")
    return digest.hexdigest()
