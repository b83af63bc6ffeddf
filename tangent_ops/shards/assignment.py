"""Which sample goes to which shard."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from tangent_ops.checks import check_integer
from tangent_ops.errors import ArgumentError

Assignment = dict[str, list[str]]  # shard -> ids of its samples


def by_hash(
    ids: Sequence[str], shards: int, *, proportions: Sequence[float] | None = None
) -> Assignment:
    """Assign samples to shards by the SHA-256 of their ids.

    A sample's shard depends on its id and the proportions only, so adding or removing samples moves
    no other sample.

    Args:
        ids: of the samples.
        shards: number of shards; named shard-0 and so on, all with the digits of the last one.
        proportions: of the shards, positive, in any unit; None for equal ones.

    Raises:
        ArgumentError: shards is not a positive integer, or proportions are not as above.
    """
    check_integer("shards", shards, 1)
    parts = [1.0] * shards if proportions is None else [float(part) for part in proportions]
    if len(parts) != shards or not all(math.isfinite(part) and part > 0 for part in parts):
        raise ArgumentError(
            f"proportions must be {shards} positive numbers, one per shard, got {proportions}"
        )
    ends = list(accumulate(parts))
    digits = len(str(shards - 1))
    names = [f"shard-{k:0{digits}}" for k in range(shards)]
    found: Assignment = {name: [] for name in names}
    for sample in ids:
        digest = hashlib.sha256(sample.encode("utf-8", "surrogateescape")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64 * ends[-1]
        found[names[min(bisect_right(ends, place), shards - 1)]].append(sample)
    return found


def by_class(ids: Sequence[str], targets: Sequence[int], classes: Sequence[str]) -> Assignment:
    """One shard per class, named like the class.

    Args:
        ids: of the samples.
        targets: class index of each.
        classes: names, by index.

    Raises:
        ArgumentError: the numbers of ids and targets differ.
    """
    if len(ids) != len(targets):
        raise ArgumentError(f"{len(ids)} ids, but {len(targets)} targets")
    found: Assignment = {name: [] for name in classes}
    for sample, target in zip(ids, targets, strict=True):
        found[classes[target]].append(sample)
    return found


def by_column(ids: Sequence[str], labels: Mapping[str, str]) -> Assignment:
    """One shard per value of a column, for example a customer's number, named like the value.

    Args:
        ids: of the samples.
        labels: the column: id -> value. Other ids are ignored.

    Raises:
        ArgumentError: a sample has no value.
    """
    missing = [sample for sample in ids if not labels.get(sample)]
    if missing:
        raise ArgumentError(
            f"{len(missing)} samples have no value in the column, {missing[0]!r} first: complete "
            "the table, or leave them out of the data"
        )
    found: Assignment = {}
    for sample in ids:
        found.setdefault(labels[sample], []).append(sample)
    return found
