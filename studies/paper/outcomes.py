"""Which images a model gets right, in few characters: what test images' own error follows from."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from tangent_ops import CachedFeatures, predict


def logits_of(model: nn.Module, data: CachedFeatures) -> Tensor:
    """On the CPU, a row to each sample."""
    return predict(model, data, progress=False).cpu()


def hits(logits: Tensor, targets: Tensor) -> float:
    """Fraction of rows whose largest entry is the target's."""
    return float((logits.argmax(dim=1) == targets).double().mean())


def outcome(logits: Tensor, targets: Tensor) -> dict[str, Any]:
    """Which rows' largest entry is the target's, as JSON: their number, and bits in hex."""
    right = (logits.argmax(dim=1) == targets).numpy()
    return {"images": len(right), "right": np.packbits(right).tobytes().hex()}


def outcome_of(model: nn.Module, data: CachedFeatures) -> dict[str, Any]:
    """Which samples a model gets right, as `outcome` has it."""
    return outcome(logits_of(model, data), data.targets)


def right(told: dict[str, Any]) -> np.ndarray:
    """Of each image, 1.0 if it was right, from what `outcome` gave."""
    bits = np.frombuffer(bytes.fromhex(told["right"]), dtype=np.uint8)
    return np.unpackbits(bits)[: told["images"]].astype(float)
