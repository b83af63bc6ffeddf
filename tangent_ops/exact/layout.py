"""`Layout`: converts a delta to one flat vector, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_ops.delta import check_layout, check_values
from tangent_ops.errors import ArgumentError
from tangent_ops.model.linearized import LinearizedModel


@dataclass(frozen=True)
class Layout:
    """Where each parameter's delta lies in a flat vector.

    Attributes:
        shapes: of the deltas by name, in the vector's order.
        dtype: of the vector: float64 if a delta is, else float32.
        device: of the vector.
    """

    shapes: dict[str, torch.Size]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tangent: LinearizedModel) -> Layout:
        """The layout of a tangent model's deltas.

        Raises:
            ArgumentError: the deltas are on several devices.
        """
        deltas = tangent.deltas()
        devices = {delta.device for delta in deltas.values()}
        if len(devices) != 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ArgumentError(f"the deltas are on several devices ({names}): move them to one")
        double = any(delta.dtype == torch.float64 for delta in deltas.values())
        shapes = {name: delta.shape for name, delta in deltas.items()}
        return cls(shapes, torch.float64 if double else torch.float32, devices.pop())

    @classmethod
    def of_delta(cls, delta: Mapping[str, Tensor]) -> Layout:
        """The layout of a delta in memory, on its first tensor's device."""
        double = any(value.dtype == torch.float64 for value in delta.values())
        device = next(iter(delta.values())).device
        shapes = {name: value.shape for name, value in delta.items()}
        return cls(shapes, torch.float64 if double else torch.float32, device)

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes.values()]

    @property
    def size(self) -> int:
        return sum(self.sizes)

    @property
    def together(self) -> int:
        """How many vectors to compute with at a time: 8, or as many as `_BYTES` allow; at least 1.

        Conjugate gradients and a pass keep about 8 copies of each.
        """
        return max(1, min(_TOGETHER, _BYTES // (8 * self.size * self.dtype.itemsize)))

    def zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def views(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector, shaped as the deltas, sharing its memory."""
        parts = vector.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes.values(), strict=True)]

    def flat(self, delta: Mapping[str, Tensor], what: str = "the delta") -> Tensor:
        """A delta as a new vector.

        Raises:
            DeltaError: other names or shapes, or values that are not finite.
        """
        check_values(delta, what)
        check_layout(delta, dict(zip(self.shapes, self.views(self.zeros()), strict=True)), what)
        parts = [delta[name].detach().reshape(-1) for name in self.shapes]
        return torch.cat([part.to(self.device, self.dtype) for part in parts])

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts of a vector by name, sharing its memory."""
        return dict(zip(self.shapes, self.views(vector), strict=True))


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two vectors, summed in float64."""
    if a.dtype == torch.float64:
        return float(a.dot(b))
    parts = zip(a.split(_CHUNK), b.split(_CHUNK), strict=True)
    return sum(float(x.double().dot(y.double())) for x, y in parts)


def norm(a: Tensor) -> float:
    """The Euclidean norm of a vector, its squares summed in float64."""
    return dot(a, a) ** 0.5


_CHUNK = 1 << 20  # entries that are in float64 at a time
_TOGETHER = 8  # more are not faster on a CPU
_BYTES = 1 << 30
