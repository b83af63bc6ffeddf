"""`Stored`: f and J of some samples, kept as parts; products with J need no pass of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_ops.exact.layout import Layout
from tangent_ops.exact.parts import Part

BATCH = 512  # samples of a product with J; bounds its temporaries


@dataclass(frozen=True)
class Stored:
    """f(x) and J(x) of N samples.

    Attributes:
        logits: f, (N, C).
        parts: of J; all parameters by which a derivative is not zero have their place in one.
        shape: of a sample's output, with C entries.
    """

    logits: Tensor
    parts: tuple[Part, ...]
    shape: torch.Size

    @classmethod
    def joined(cls, several: Sequence[Stored]) -> Stored:
        """The samples of all, in order; their parts have the same places."""
        if len(several) == 1:
            return several[0]
        first = several[0]
        parts = tuple(
            part.changed(
                **{
                    name: torch.cat([one.parts[index].tensors[name] for one in several])
                    for name in part.tensors
                }
            )
            for index, part in enumerate(first.parts)
        )
        return cls(torch.cat([one.logits for one in several]), parts, first.shape)

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def nbytes(self) -> int:
        tensors = [t for part in self.parts for t in part.tensors.values()]
        return sum(tensor.nbytes for tensor in [*tensors, self.logits])

    def take(self, indices: slice | Tensor) -> Stored:
        """Some of the samples; a slice shares memory."""
        parts = tuple(part.take(indices) for part in self.parts)
        return Stored(self.logits[indices], parts, self.shape)

    def to(self, device: torch.device, dtype: torch.dtype) -> Stored:
        """The same on another device, in another precision."""
        parts = [
            part.changed(**{n: tensor.to(device, dtype) for n, tensor in part.tensors.items()})
            for part in self.parts
        ]
        return Stored(self.logits.to(device, dtype), tuple(parts), self.shape)

    def split(self, count: int) -> Iterator[Stored]:
        """`count` samples at a time."""
        for start in range(0, len(self), count):
            yield self.take(slice(start, start + count))

    def jvp(self, vectors: Tensor) -> Tensor:
        """J v for flat vectors (R, P): (R, N, C)."""
        total = self.logits.new_zeros(len(vectors), *self.logits.shape)
        for part in self.parts:
            total += part.jvp(vectors)
        return total

    def add_vjp(self, weights: Tensor, total: Tensor) -> None:
        """Add Jᵀ u of weights (R, N, C) to flat vectors (R, P)."""
        for part in self.parts:
            part.add_vjp(weights, total)

    def gram(self, other: Stored) -> Tensor:
        """J J'ᵀ, (N C, M C) in float64; each part's product is in the parts' own precision."""
        shape = self.logits.numel(), other.logits.numel()
        total = torch.zeros(shape, dtype=torch.float64, device=self.logits.device)
        for part, others in zip(self.parts, other.parts, strict=True):
            total += part.gram(others)
        return total

    def own(self) -> Tensor:
        """J_n J_nᵀ of each sample, (N, C, C) in float64."""
        count, outputs = self.logits.shape
        total = self.logits.new_zeros(count, outputs, outputs, dtype=torch.float64)
        for part in self.parts:
            total += part.own()
        return total


class StoredJacobian:
    """What `Jacobian` offers, for inputs that are `Stored`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.device = layout.device

    def unpack(self, batch: tuple[Stored, Tensor]) -> tuple[Stored, Tensor]:
        """Samples and targets of a batch."""
        return batch

    def outputs(self, delta: Tensor | None, inputs: Stored) -> tuple[Tensor, Tensor]:
        """f and J Δ, (n, ...), shaped as the model's output; None for Δ = 0."""
        if delta is None:
            primal = inputs.logits.view(len(inputs), *inputs.shape)
            return primal, torch.zeros_like(primal)
        primal, tangents = self.outputs_many(delta[None], inputs)
        return primal, tangents[0]

    def outputs_many(self, directions: Tensor, inputs: Stored) -> tuple[Tensor, Tensor]:
        """f, (n, ...), and J v for each row v of (R, P), (R, n, ...)."""
        shape = (len(inputs), *inputs.shape)
        return inputs.logits.view(shape), inputs.jvp(directions).view(-1, *shape)

    def pull_back(
        self, direction: Tensor, inputs: Stored, cotangent: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Tensor]:
        """Jᵀ c in parts, shaped as the deltas; c may depend on f and J v."""
        pulled = self.pull_back_many(
            direction[None], inputs, lambda primal, tangents: cotangent(primal, tangents[0])[None]
        )
        return self.layout.views(pulled[0])

    def pull_back_many(
        self, directions: Tensor, inputs: Stored, cotangent: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Jᵀ c_r for R cotangents, (R, P); see `Jacobian.pull_back_many`."""
        weights = cotangent(*self.outputs_many(directions, inputs))
        weights = weights.reshape(-1, *inputs.logits.shape).to(inputs.logits.dtype)
        total = torch.zeros_like(directions)
        inputs.add_vjp(weights, total)
        return total

    def rows(self, one: Stored) -> Tensor:
        """The rows of J, (C, P), for one sample."""
        outputs = one.logits.shape[1]
        eye = torch.eye(outputs, dtype=self.layout.dtype, device=self.device)
        rows = self.layout.zeros().repeat(outputs, 1)
        one.add_vjp(eye[:, None], rows)
        return rows


class StoredBatches:
    """Batches of stored samples with their targets, as a loader yields them.

    Args:
        stored: J of some samples.
        targets: of these samples.
        dtype: of what is read, if the samples are kept in 16 bits.
        indices: those that are read; None for all.
    """

    def __init__(
        self, stored: Stored, targets: Tensor, dtype: torch.dtype, indices: Tensor | None = None
    ) -> None:
        self.stored = stored
        self.targets = targets
        self.dtype = dtype
        self.indices = indices
        self.batch_size = BATCH

    def __len__(self) -> int:
        return -(-self.samples // BATCH)

    @property
    def samples(self) -> int:
        return len(self.stored) if self.indices is None else len(self.indices)

    def __iter__(self) -> Iterator[tuple[Stored, Tensor]]:
        for start in range(0, self.samples, BATCH):
            where: slice | Tensor = slice(start, min(start + BATCH, self.samples))
            if self.indices is not None:
                where = _as_slice(self.indices[where])
            yield self.stored.take(where).to(self.targets.device, self.dtype), self.targets[where]

    def take(self, indices: Sequence[int]) -> StoredBatches:
        """Batches of some of the samples; nothing is copied."""
        chosen = torch.as_tensor(indices)  # on the CPU, which indexes tensors of any device
        chosen = chosen if self.indices is None else self.indices[chosen]
        return StoredBatches(self.stored, self.targets, self.dtype, chosen)

    def joined(self, stored: Stored, targets: Tensor) -> StoredBatches:
        """These samples, and others after them."""
        mine = self.stored if self.indices is None else self.stored.take(_as_slice(self.indices))
        own = self.targets if self.indices is None else self.targets[_as_slice(self.indices)]
        return StoredBatches(Stored.joined([mine, stored]), torch.cat([own, targets]), self.dtype)


def _as_slice(indices: Tensor) -> slice | Tensor:
    """Consecutive indices as a slice, which copies nothing."""
    first, last = int(indices[0]), int(indices[-1])
    if last - first + 1 == len(indices) and bool((indices.diff() == 1).all()):
        return slice(first, last + 1)
    return indices
