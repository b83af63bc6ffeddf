"""`Weight`: where the delta of a parameter, or of a view of it, lies in a flat vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_ops.exact.layout import Layout
from tangent_ops.exact.parts import Place
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.model.low_rank import matrix_shape
from tangent_ops.model.tree import lookup


@dataclass(frozen=True)
class Use:
    """How a linear map uses a parameter: its rows of J are Σ_t g_t a_tᵀ at a place.

    Attributes:
        place: (H, O, K) of a weight, (H, O) of a bias.
        inputs: a matrix that the inputs are multiplied by first, (in, K) or (H, in, K); or None.
        cotangents: likewise for the outputs' cotangents.
        merged: whether the heads are positions of one map: they share a core.
    """

    place: Place
    inputs: Tensor | None = None
    cotangents: Tensor | None = None
    merged: bool = False


@dataclass(frozen=True)
class Weight:
    """A trained parameter of the anchor.

    Attributes:
        tensor: the parameter at w0.
        place: of its delta.
        right: A (r, in), of a delta B A or B C A; None for a full delta.
        left: B (out, r), of a delta B C A; None for others.
    """

    tensor: Tensor
    place: Place
    right: Tensor | None
    left: Tensor | None

    def use(self, view: Tensor) -> Use | None:
        """How a linear map with this weight, or bias, uses the parameter; None if it does not.

        Args:
            view: what the map was called with: the parameter, a part of its rows, or such a part
                of each head, (H, ...), possibly transposed.
        """
        own = self.tensor
        if view.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():
            return None
        first = int(view.storage_offset() - own.storage_offset())
        inside = 0 <= first < own.numel() and view.dtype == own.dtype
        if not inside or not own.is_contiguous():
            return None
        shape, strides = tuple(view.shape), tuple(view.stride())
        if self.right is None:
            return Use(Place(shape, strides, self.place.offset + first))
        return self._use_of_matrix(shape, strides, first)

    def of_rows(self, rows: Tensor) -> Tensor:
        """Rows of J by the parameter, (n, C, ...), as those by its delta, (n, C, p)."""
        if self.right is None:
            return rows.flatten(2)
        matrices = rows.reshape(*rows.shape[:2], *matrix_shape(self.tensor))
        found = matrices.to(self.right.dtype) @ self.right.T
        return (found if self.left is None else self.left.T @ found).flatten(2)

    def _use_of_matrix(
        self, shape: tuple[int, ...], strides: tuple[int, ...], first: int
    ) -> Use | None:
        assert self.right is not None
        rank, columns = self.right.shape
        row, rest = divmod(first, columns)
        transposed = strides[-1] != 1
        width, rows = (shape[-2], shape[-1]) if transposed else (shape[-1], shape[-2])
        steps = (strides[-1], strides[-2]) if transposed else (strides[-2], strides[-1])
        per_head = strides[0] // columns if len(shape) == 3 else 0
        if rest or width != columns or steps != (columns, 1) or len(shape) > 3:
            return None
        if len(shape) == 3 and strides[0] % columns:
            return None
        heads = (shape[0],) if len(shape) == 3 else ()
        if self.left is not None:
            return self._use_of_core(row, heads, rows, per_head, transposed)
        own = (rank, rows) if transposed else (rows, rank)
        steps = (1, rank) if transposed else (rank, 1)
        strides = (per_head * rank,) if len(shape) == 3 else ()
        place = Place((*heads, *own), (*strides, *steps), self.place.offset + row * rank)
        side = self.right.T
        return Use(place, cotangents=side) if transposed else Use(place, inputs=side)

    def _use_of_core(
        self, row: int, heads: tuple[int, ...], rows: int, per_head: int, transposed: bool
    ) -> Use | None:
        """C is shared by all rows; each row of the weight has its own row of B."""
        assert self.left is not None and self.right is not None
        if heads and per_head != rows:
            return None
        count = rows * (heads[0] if heads else 1)
        side = self.left[row : row + count]
        side = side.unflatten(0, (*heads, rows)) if heads else side
        shape = self.place.shape
        whole = Place(shape[::-1], (1, shape[1]), self.place.offset) if transposed else self.place
        if transposed:
            return Use(whole, inputs=side, cotangents=self.right.T, merged=bool(heads))
        return Use(whole, inputs=self.right.T, cotangents=side, merged=bool(heads))


def weights_of(tangent: LinearizedModel) -> dict[str, Weight]:
    """The trained parameters by name."""
    layout, found, offset = Layout.of(tangent), {}, 0
    bases, lefts = tangent.basis.tensors(), tangent.left.tensors()
    for name, shape in layout.shapes.items():
        place = Place.contiguous(shape, offset)
        sides = (bases.get(name), lefts.get(name))
        right, left = (None if side is None else side.to(layout.dtype) for side in sides)
        found[name] = Weight(lookup(tangent.anchor, name).detach(), place, right, left)
        offset += torch.Size(shape).numel()
    return found
