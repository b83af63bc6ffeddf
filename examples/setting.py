"""What the demo compares on: its options, and how the images are dealt out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from assets import DemoError
from images import Images, stratified

PUBLIC_SHARE = 1 / 6  # of the training images: for the anchor's head, in no shard


@dataclass(frozen=True)
class Settings:
    """The options of one run.

    Attributes:
        out: Folder for the deltas and the report.
        shards: How many shards the private images are dealt into.
        forget: The shard to forget, from 1.
        epochs: Passes over its data in every training of the last block.
        train_size: Training images, public and private together.
        test_size: Images that every model is scored on; as many more are kept for validation.
        seed: Of the split and of the order of the samples.
        score_on: "test" or "validation".
        exact: Images of each shard for the exact part; 0 leaves it out.
    """

    out: Path
    shards: int = 5
    forget: int = 3
    epochs: int = 6
    train_size: int = 1200
    test_size: int = 1000
    seed: int = 0
    score_on: str = "test"
    exact: int = 16

    def __post_init__(self) -> None:
        if self.shards < 2:
            raise DemoError(f"--shards {self.shards}: at least 2, one to forget and one to keep")
        if not 1 <= self.forget <= self.shards:
            raise DemoError(f"--forget {self.forget}: expected a shard from 1 to {self.shards}")
        if self.exact < 0:
            raise DemoError(
                f"--exact {self.exact}: a number of images, or 0 to leave that part out"
            )


@dataclass(frozen=True)
class Split:
    """Disjoint sets of images, each with the class proportions of the whole.

    Attributes:
        public: Images that will never have to be forgotten: they train the anchor's head.
        shards: The private images, in equal parts.
        scored: The images that every model is scored on.
    """

    public: Images
    shards: Sequence[Images]
    scored: Images


def split_images(images: Images, settings: Settings) -> Split:
    """Deal the images out; which are test images depends on the seed and their number alone.

    Raises:
        DemoError: There are too few images.
    """
    held_out = min(settings.test_size, len(images.targets) // 4)
    train = min(settings.train_size, len(images.targets) - 2 * held_out)
    public = round(train * PUBLIC_SHARE)
    shard = (train - public) // settings.shards
    if public < len(images.classes) or shard < len(images.classes):
        raise DemoError(
            f"{train} training images give {public} public ones and {shard} to a shard, fewer "
            f"than the {len(images.classes)} classes: raise --train-size, lower --shards or "
            "bring more images"
        )
    if shard < settings.exact:
        raise DemoError(f"--exact {settings.exact}: a shard has only {shard} images")
    sizes = [held_out, held_out, public] + [shard] * settings.shards
    parts = [images.subset(part) for part in stratified(images.targets, sizes, settings.seed)]
    scored = parts[0] if settings.score_on == "test" else parts[1]
    return Split(parts[2], parts[3:], scored)
