"""The image sets by name: how each is loaded, where it comes from, how it is split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from studies.paper.data import emoji, emoji_fine, grey, silhouettes
from studies.paper.data.pool import Pool, Source


@dataclass(frozen=True)
class ImageSet:
    """One set.

    Attributes:
        load: Takes the cache folder.
        source: What is said about it.
        test: How many images every model is scored on; the same ones for every seed.
        pool: How many others seeds draw training and validation images from.
        drawings: How many consecutive images are of one thing: they are never in different parts,
            so `test` and `pool` are multiples of it.
        shifted: The same images, drawn by others: for test images alone.
        shifted_source: What is said about those.
    """

    load: Callable[[Path], Pool]
    source: Callable[[], Source]
    test: int
    pool: int
    drawings: int = 1
    shifted: Callable[[Path], Pool] | None = None
    shifted_source: Callable[[], Source] | None = None


SETS = {
    "emoji": ImageSet(
        partial(emoji.load_emoji, "google"),
        partial(emoji.source, "google"),
        test=400,
        pool=1236,
        shifted=partial(emoji.load_emoji, "twitter"),
        shifted_source=partial(emoji.source, "twitter"),
    ),
    "emoji-fine": ImageSet(emoji_fine.load_fine, emoji_fine.source, 400, 1148, drawings=2),
    "silhouettes": ImageSet(silhouettes.load_silhouettes, silhouettes.source, 1000, 1500),
    "fashion": ImageSet(grey.load_fashion, grey.fashion_source, 1000, 4500),
    "mnist": ImageSet(grey.load_mnist, grey.mnist_source, 1000, 1500),
    "digits": ImageSet(grey.load_digits, grey.digits_source, 200, 200),
}
