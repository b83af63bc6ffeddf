"""`Pool`: all images of one set, with what has to be said about where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Pool:
    """Labelled images in memory.

    Attributes:
        name: What reports call it.
        pixels: (count, 1 or 3, height, width), uint8.
        targets: Class indices, (count,) int64.
        classes: Class names, one to an index.
    """

    name: str
    pixels: Tensor
    targets: Tensor
    classes: Sequence[str]

    def inputs(self, rows: Tensor, size: int, mean: Sequence[float], std: Sequence[float]):
        """What a model takes: (len(rows), 3, size, size), float32, normalised."""
        images = self.pixels[rows].float() / 255
        large = F.interpolate(images, size=(size, size), mode="bicubic").clamp(0, 1)
        colour = large.expand(-1, 3, -1, -1)
        return (colour - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@dataclass(frozen=True)
class Source:
    """Where a set comes from.

    Attributes:
        package: The package and its registry.
        licence: Of the images, as the package states it.
        sha256: Of what is fetched, hex.
        note: What was done to it.
    """

    package: str
    licence: str
    sha256: str
    note: str
