"""Rows of a plan, one per sample: checks, hashes, and compares them with the present images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tqdm import tqdm

from tangent_ops.errors import ArgumentError, SampleError, UnsupportedError
from tangent_ops.files import to_json
from tangent_ops.shards.data import ImageData, Samples, safe
from tangent_ops.shards.manifest import LONGEST_NAME, Sample, valid_name

Rows = list[tuple[str, str, int, str | None]]  # shard, id, class index, label


def check_names(assignment: Mapping[str, Sequence[str]]) -> None:
    """Raise ArgumentError unless shards have valid names and at least one has samples."""
    if not assignment or not any(assignment.values()):
        raise ArgumentError("assignment has no samples: there is nothing to train")
    for name, ids in assignment.items():
        if not isinstance(name, str) or not valid_name(name):
            raise ArgumentError(
                f"shard {name!r}: a name is up to {LONGEST_NAME} printable characters"
            )
        if isinstance(ids, str):
            raise ArgumentError(f"shard {name!r} maps to a string: give a list of ids")
        if len(set(ids)) != len(ids):
            raise ArgumentError(f"shard {name!r} has a sample twice")


def rows_of(
    samples: Samples,
    assignment: Mapping[str, Sequence[str]],
    labels: Mapping[str, str],
    classes: int,
) -> Rows:
    """Pair every assigned id with its class index and label; ArgumentError for unknown ones."""
    targets = dict(zip(samples.ids, samples.targets, strict=True))
    rows: Rows = []
    for shard, ids in assignment.items():
        for id in sorted(ids):
            if id not in targets:
                raise ArgumentError(f"shard {shard!r} has {id!r}, which is not in the data")
            if not safe(id) or not id.isprintable():
                raise ArgumentError(f"sample {id!r}: its name has characters that do not print")
            if not 0 <= targets[id] < classes:
                raise ArgumentError(
                    f"sample {id!r} is of class {targets[id]}, and the anchor has {classes}"
                )
            rows.append((shard, id, targets[id], labels.get(id)))
    return rows


def digest(rows: Rows) -> str:
    """SHA-256 of the rows, in hex."""
    return hashlib.sha256(to_json(rows).encode()).hexdigest()


def changes(rows: Rows, shards: Iterable[tuple[str, Sequence[Sample]]]) -> tuple[int, int]:
    """How many rows the shards lack, and how many they have in addition."""
    now = set(rows)
    here = {(shard, s.id, s.target, s.label) for shard, samples in shards for s in samples}
    return len(now - here), len(here - now)


def hashed(samples: Samples, rows: Rows, progress: bool) -> Iterator[tuple[str, Sample]]:
    """Read each row's sample; yield its shard, and the sample with the hash of its content."""
    places = {id: index for index, id in enumerate(samples.ids)}
    contents: dict[str, str] = {}
    for shard, id, target, label in tqdm(
        rows, "hash samples", unit="sample", delay=2, leave=False, disable=not progress
    ):
        if id not in contents:
            contents[id] = samples.content(places[id])
        yield shard, Sample(id, target, contents[id], label)


def difference(data: ImageData, samples: Sequence[Sample], progress: bool) -> str | None:
    """What is missing in the data or differs from the plan, in words; None if nothing does.

    Every sample is read.
    """
    try:
        ids, targets, contents = zip(*((s.id, s.target, s.content) for s in samples), strict=True)
        there = data.pick(ids, targets, contents, None)
    except (ArgumentError, UnsupportedError) as error:
        return str(error)
    missing, changed = [], []
    for index, sample in enumerate(
        tqdm(samples, "check samples", unit="sample", delay=2, leave=False, disable=not progress)
    ):
        try:
            if there.content(index) != sample.content:
                changed.append(sample.id)
        except (ArgumentError, SampleError):
            missing.append(sample.id)
    words = [
        f"{len(ids)} of {len(samples)} images {what}, {ids[0]!r} first"
        for what, ids in (("cannot be read", missing), ("are not what they were", changed))
        if ids
    ]
    return f"{data.root}: {'; '.join(words)}" if words else None
