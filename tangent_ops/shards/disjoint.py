"""Checks that shards, and public images, have no samples in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tangent_ops.errors import ArgumentError
from tangent_ops.shards.data import Samples
from tangent_ops.shards.manifest import Sample
from tangent_ops.shards.recipe import ShardRecipe

PUBLIC = (
    "sample {!r} is public, too, as {!r}: what the anchor learned from it cannot be forgotten. "
    "Remove it from one of them"
)
VALIDATION = (
    "sample {!r} is a validation image, too, as {!r}: the accuracy would be that of images that "
    "were learned. Remove it from one of them"
)


def check_disjoint(shards: Mapping[str, Sequence[Sample]]) -> None:
    """Raise ArgumentError if two shards share a sample, or copies of one."""
    first: dict[str, tuple[str, str]] = {}
    for shard, samples in shards.items():
        for sample in samples:
            other, id = first.setdefault(sample.content, (shard, sample.id))
            if other != shard:
                same = "" if id == sample.id else f", with the same content as {id!r}"
                raise ArgumentError(
                    f"sample {sample.id!r} of shard {shard!r}{same} is in shard {other!r}, too: "
                    "forgetting it there would leave it here. Remove one, or allow overlap, which "
                    "the plan records"
                )


def check_public(public: Samples, shards: Mapping[str, Sequence[Sample]]) -> None:
    """Raise ArgumentError if a shard has a sample that the anchor was made from."""
    if found := _common(public, shards):
        raise ArgumentError(PUBLIC.format(*found))


def check_validation(validation: Samples, shards: Mapping[str, Sequence[Sample]]) -> None:
    """Raise ArgumentError if a shard has a sample that accuracies would be measured on."""
    if found := _common(validation, shards):
        raise ArgumentError(VALIDATION.format(*found))


def _common(others: Samples, shards: Mapping[str, Sequence[Sample]]) -> tuple[str, str] | None:
    """The ids, here and there, of an image that is in a shard and among others."""
    here = {s.content: s.id for samples in shards.values() for s in samples}
    for index, id in enumerate(others.ids):
        if (found := here.get(others.content(index))) is not None:
            return found, id
    return None


def check_apart(others: Samples, private: Samples, message: str) -> None:
    """Raise ArgumentError if an image is among both, before the private images are hashed.

    Only files of equal size are read. Images that are no files are left to `check_public` and
    `check_validation`.

    Args:
        others: public or validation images.
        private: those of the run.
        message: PUBLIC or VALIDATION.
    """
    by_size: dict[int, list[int]] = {}
    for index in range(len(private)):
        if (size := private.size(index)) is not None:
            by_size.setdefault(size, []).append(index)
    contents: dict[int, str] = {}
    for index, id in enumerate(others.ids):
        near = by_size.get(others.size(index) or -1, [])
        content = others.content(index) if near else ""
        for other in near:
            if other not in contents:
                contents[other] = private.content(other)
            if contents[other] == content:
                raise ArgumentError(message.format(private.ids[other], id))


def check_private(
    recipe: ShardRecipe, assignment: Mapping[str, Sequence[str]], allow_overlap: bool
) -> None:
    """Raise ArgumentError if the recipe is private, and not for shards of these samples' ids."""
    if recipe.dp_epsilon is None:
        return
    if allow_overlap:
        raise ArgumentError(
            "allow_overlap is not for private fits: a sample in k shards is protected k times "
            "less. Make the shards disjoint"
        )
    largest = max(map(len, assignment.values()))
    if recipe.dp_delta is not None and recipe.dp_delta * largest >= 1:
        raise ArgumentError(
            f"dp_delta={recipe.dp_delta:g} is not below one over the {largest} samples of the "
            "largest shard: publishing one whole sample would be allowed"
        )


def check_no_copies(shards: Mapping[str, Sequence[Sample]]) -> None:
    """Raise ArgumentError if a shard has a sample twice: a private fit would protect it less."""
    for samples in shards.values():
        first: dict[str, str] = {}
        for sample in samples:
            other = first.setdefault(sample.content, sample.id)
            if other != sample.id:
                raise ArgumentError(
                    f"sample {sample.id!r} is a copy of {other!r}: in a private fit a sample "
                    "may occur only once. Remove one"
                )
