"""Parts of J of some samples: a layer's rows, as factors or as they are.

The gradient of sample n's output c by the weight of a linear layer is a sum over the positions t
at which the layer ran (tokens, patches):

    ∂z_nc / ∂W = Σ_t g_nct a_ntᵀ        ∂z_nc / ∂b = Σ_t g_nct

with the layer's input a and the output's cotangent g. So products with J need no gradient, and no
pass through the model; and J Jᵀ is a product of two small Gram matrices,

    K[(n,c),(m,d)] = Σ_t,t' (a_nt · a_mt' + 1) (g_nct · g_mdt')        (1: if there is a bias)

(the identity behind "ghost norms": Li, Tramèr, Liang, Hashimoto, "Large Language Models Can Be
Strong Differentially Private Learners", ICLR 2022, section 4; here for pairs of samples).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

PAIRS = 1 << 24  # entries of a temporary for the pairs of positions of a Gram matrix


@dataclass(frozen=True)
class Place:
    """A view of one parameter's part of a flat vector, as `torch.Tensor.as_strided` takes it.

    Attributes:
        shape: of the view.
        strides: in entries.
        offset: of its first entry in the flat vector.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def contiguous(cls, shape: Sequence[int], offset: int) -> Place:
        """A whole parameter."""
        strides = torch.empty(tuple(shape), device="meta").stride()
        return cls(tuple(shape), tuple(strides), offset)

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    def of(self, vectors: Tensor) -> Tensor:
        """The view of each of some flat vectors (R, P): (R, *shape), sharing their memory."""
        strides = (vectors.stride(0), *self.strides)
        offset = vectors.storage_offset() + self.offset
        return vectors.as_strided((len(vectors), *self.shape), strides, offset)

    def heads(self, dims: int) -> Place:
        """The same with a leading dimension of one head, unless it has `dims` + 1 dimensions."""
        if len(self.shape) > dims:
            return self
        return replace(self, shape=(1, *self.shape), strides=(0, *self.strides))


class Part(Protocol):
    """Rows of J by some of the parameters, for N samples with C outputs."""

    def jvp(self, vectors: Tensor) -> Tensor:
        """J v for flat vectors (R, P): (R, N, C)."""
        ...

    def add_vjp(self, weights: Tensor, total: Tensor) -> None:
        """Add Jᵀ u of weights (R, N, C) to flat vectors (R, P)."""
        ...

    def gram(self, other: Part) -> Tensor:
        """J J'ᵀ with other samples' rows of the same kind, (N C, M C)."""
        ...

    def own(self) -> Tensor:
        """J_n J_nᵀ of each sample, (N, C, C)."""
        ...

    def take(self, indices: slice | Tensor) -> Part:
        """The rows of some of the samples; a slice shares memory."""
        ...

    @property
    def work(self) -> int:
        """Floating-point operations of J v and Jᵀ u together."""
        ...

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it keeps, by name; the first dimension is N."""
        ...

    def changed(self, **tensors: Tensor) -> Part:
        """The same with other tensors: of other samples, or kept elsewhere."""
        ...


@dataclass(frozen=True)
class Factors:
    """A linear layer, or one for each of H heads, by its inputs and its outputs' cotangents.

    Attributes:
        inputs: a (N, H, T, K).
        cotangents: g (N, C, H, T, O).
        weight: where W (H, O, K) is; None if it is not trained.
        bias: where b (H, O) is; None if it is not trained.
    """

    inputs: Tensor
    cotangents: Tensor
    weight: Place | None
    bias: Place | None

    def jvp(self, vectors: Tensor) -> Tensor:
        a, r = self.inputs, len(vectors)
        n, h, t, k = a.shape
        y = a.new_zeros(r, h, n * t, self.cotangents.shape[-1])
        if self.weight is not None:
            rows = a.transpose(0, 1).reshape(h, n * t, k)
            y += rows @ self.weight.of(vectors).mT
        if self.bias is not None:
            y += self.bias.of(vectors)[:, :, None]
        y = y.unflatten(2, (n, t)).permute(2, 1, 3, 4, 0).reshape(n, -1, r)  # (N, H T O, R)
        return (self.cotangents.flatten(2) @ y).permute(2, 0, 1)

    def add_vjp(self, weights: Tensor, total: Tensor) -> None:
        n, h, t, k = self.inputs.shape
        y = weights.transpose(0, 1) @ self.cotangents.flatten(2)  # (N, R, H T O)
        y = y.unflatten(2, (h, t, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)  # (R, H, N T, O)
        if self.weight is not None:
            rows = self.inputs.transpose(0, 1).reshape(h, n * t, k)
            self.weight.of(total).add_(y.mT @ rows)
        if self.bias is not None:
            self.bias.of(total).add_(y.sum(2))

    def gram(self, other: Part) -> Tensor:
        assert isinstance(other, Factors)
        n, c, h, t, o = self.cotangents.shape
        m, d, _, s, _ = other.cotangents.shape
        if t == s == 1:
            total = self.inputs.new_zeros(n, c, m, d)
            for head in range(h):
                a = self._inner(self.inputs[:, head, 0], other.inputs[:, head, 0])
                g = self.cotangents[:, :, head, 0].reshape(n * c, o)
                g = g @ other.cotangents[:, :, head, 0].reshape(m * d, o).T
                total += g.view(n, c, m, d) * a[:, None, :, None]
            return total.view(n * c, m * d)
        # Per pair of samples: T T' pairs of positions, or matrices that are O x K.
        k = self.inputs.shape[3]
        if t * s * (k + c * d * (o + 1)) > c * d * o * (k + 1):
            return self.as_rows().gram(other.as_rows())
        return self._gram_of_positions(other)

    def own(self) -> Tensor:
        a, g = self.inputs, self.cotangents
        n, c, h, t, _ = g.shape
        between = self._inner(a, a)  # (N, H, T, T)
        g = g.transpose(1, 2).flatten(2, 3)  # (N, H, C T, O)
        pairs = (g @ g.mT).view(n, h, c, t, c, t)
        return torch.einsum("nhts,nhctds->ncd", between, pairs)

    def take(self, indices: slice | Tensor) -> Factors:
        return self.changed(inputs=self.inputs[indices], cotangents=self.cotangents[indices])

    @property
    def work(self) -> int:
        return 4 * (self.inputs.numel() * self.cotangents.shape[-1] + self.cotangents.numel())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs, "cotangents": self.cotangents}

    def changed(self, **tensors: Tensor) -> Factors:
        return replace(self, **tensors)

    def as_rows(self) -> Rows:
        """The same as explicit rows, (N, C, H O K), and H O more for a bias."""
        a, g = self.inputs, self.cotangents
        c, o = g.shape[1], g.shape[4]
        parts, places = [], []
        if self.weight is not None:
            rows = g.permute(0, 2, 1, 4, 3).flatten(2, 3) @ a  # (N, H, C O, K)
            parts.append(rows.unflatten(2, (c, o)).transpose(1, 2).flatten(2))
            places.append(self.weight)
        if self.bias is not None:
            parts.append(g.sum(3).flatten(2))
            places.append(self.bias)
        return Rows(torch.cat(parts, dim=2), tuple(places))

    def _inner(self, a: Tensor, b: Tensor) -> Tensor:
        """a · b (+ 1) of all pairs of rows."""
        found = a @ b.mT if self.weight is not None else a.new_zeros(*a.shape[:-1], b.shape[-2])
        return found + 1 if self.bias is not None else found

    def _gram_of_positions(self, other: Factors) -> Tensor:
        n, c, h, t, o = self.cotangents.shape
        m, d, _, s, _ = other.cotangents.shape
        total = self.inputs.new_zeros(n, c, m, d)
        step = max(1, PAIRS // (c * t * m * d * s))
        for first in range(0, n, step):
            some = self.take(slice(first, first + step))
            for head in range(h):
                a = some.inputs[:, head].reshape(-1, some.inputs.shape[3])
                b = other.inputs[:, head].reshape(m * s, -1)
                left = some.cotangents[:, :, head].reshape(-1, o)
                right = other.cotangents[:, :, head].reshape(m * d * s, o)
                total[first : first + step] += torch.einsum(
                    "ntms,nctmds->ncmd",
                    self._inner(a, b).view(-1, t, m, s),
                    (left @ right.T).view(-1, c, t, m, d, s),
                )
        return total.view(n * c, m * d)


@dataclass(frozen=True)
class Rows:
    """Explicit rows of J by some parameters.

    Attributes:
        rows: (N, C, p).
        places: of the columns in a flat vector; their sizes sum to p.
    """

    rows: Tensor
    places: tuple[Place, ...]

    def jvp(self, vectors: Tensor) -> Tensor:
        n, c, p = self.rows.shape
        columns = torch.cat([place.of(vectors).flatten(1) for place in self.places], dim=1)
        return (self.rows.view(n * c, p) @ columns.T).T.unflatten(1, (n, c))

    def add_vjp(self, weights: Tensor, total: Tensor) -> None:
        found = weights.flatten(1) @ self.rows.flatten(0, 1)
        sizes = [place.size for place in self.places]
        for place, part in zip(self.places, found.split(sizes, dim=1), strict=True):
            place.of(total).add_(part.unflatten(1, place.shape))

    def gram(self, other: Part) -> Tensor:
        assert isinstance(other, Rows)
        return self.rows.flatten(0, 1) @ other.rows.flatten(0, 1).T

    def own(self) -> Tensor:
        return self.rows @ self.rows.mT

    def take(self, indices: slice | Tensor) -> Rows:
        return self.changed(rows=self.rows[indices])

    @property
    def work(self) -> int:
        return 4 * self.rows.numel()

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows}

    def changed(self, **tensors: Tensor) -> Rows:
        return replace(self, **tensors)
