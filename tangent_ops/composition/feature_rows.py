"""`FeatureRows`: the outputs and Jacobians of samples, of which statistics are sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureRows:
    """f and J of some samples, as `TangentStatistics` sums them.

    Attributes:
        outputs: f, (n, C).
        core: φ, (n, C, k).
        head: a, (n, h), with a 1 for a bias.
    """

    outputs: Tensor
    core: Tensor
    head: Tensor

    @classmethod
    def joined(cls, several: Sequence[FeatureRows]) -> FeatureRows:
        """The samples of all, in order."""
        return cls(
            torch.cat([rows.outputs for rows in several]),
            torch.cat([rows.core for rows in several]),
            torch.cat([rows.head for rows in several]),
        )

    def __len__(self) -> int:
        return len(self.outputs)
