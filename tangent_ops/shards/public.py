"""What a plan takes from public images: the basis of the method "statistics"."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tangent_ops.errors import ArgumentError
from tangent_ops.files import to_json
from tangent_ops.model.core_basis import CoreBasis, core_basis
from tangent_ops.shards.anchor import load_anchor
from tangent_ops.shards.data import ImageData
from tangent_ops.shards.recipe import ShardRecipe

_BATCH = 32  # images in memory at a time


def public_digest(public: ImageData | None) -> str:
    """SHA-256 of the images' contents, in hexadecimal.

    Raises:
        ArgumentError: there are no public images.
    """
    if public is None:
        raise ArgumentError(
            "method 'statistics' needs public images, from which its basis is computed, because a "
            "basis remembers its images: give a folder of images that will never have to be "
            "forgotten (--public; public=ImageData(...) in Python)"
        )
    samples = public.open()
    contents = sorted(samples.content(index) for index in range(len(samples)))
    return hashlib.sha256(to_json(contents).encode()).hexdigest()


def public_basis(anchor: Path, recipe: ShardRecipe, public: ImageData) -> CoreBasis:
    """The basis of the anchor in a file, computed from the images."""
    model, info = load_anchor(anchor)
    pattern = recipe.trainable(model) or ""  # which every name matches
    samples = public.open(info.input)
    return core_basis(model, samples, recipe.core, trainable=pattern, batch_size=_BATCH)
