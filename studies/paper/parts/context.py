"""What cells of all parts share: the prepared sets and the backbone, loaded once to a process."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from studies.paper.methods import probe, with_head
from studies.paper.tokens import FEATURES, Prepared, class_token_tail, load_model, prepare
from tangent_ops import CachedFeatures, accuracy
from tangent_ops.model.features import Tail


@dataclass(frozen=True)
class Context:
    """Where things are.

    Attributes:
        cache: Folder for packages and tokens.
        depths: Of every set, as `studies.paper.presets.Preset.depths` gives them.
        device: Of the models.
    """

    cache: Path
    depths: tuple[tuple[str, tuple[int, ...]], ...]
    device: str = "cpu"

    def prepared(self, images: str) -> Prepared:
        return _prepared(images, dict(self.depths)[images], self.cache, self.device)

    def tail(self, images: str, depth: int = 1) -> Tail:
        """From tokens to logits, with a classifier of zeros."""
        tail = class_token_tail(_model(self.cache), depth, len(self.prepared(images).classes))
        return tail.to(self.device).eval()

    def anchor(self, images: str, rows: Tensor, loss: str, seed: int, depth: int = 1) -> Tail:
        """The tail, with a probe of these images as its classifier."""
        prepared = self.prepared(images)
        head = probe(prepared.rows(FEATURES, rows), len(prepared.classes), loss, seed)
        return with_head(self.tail(images, depth), head.to(self.device))


@functools.cache
def _prepared(images: str, depths: tuple[int, ...], cache: Path, device: str) -> Prepared:
    return prepare(images, depths, cache, device)


@functools.cache
def _model(cache: Path) -> Any:
    return load_model(cache)


def score(model: nn.Module, data: CachedFeatures) -> float:
    """Fraction of samples that a model gets right."""
    return accuracy(model, data, progress=False)
