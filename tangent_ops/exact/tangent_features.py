"""`TangentFeatures`: f and J of samples, as the columns that statistics sum."""

from __future__ import annotations

import torch
from torch import Tensor

from tangent_ops.composition.ridge import FeatureRows
from tangent_ops.composition.statistics import layout_of
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.exact.extract import CHECKED, Extractor
from tangent_ops.exact.layout import Layout
from tangent_ops.exact.parts import Factors, Part, Rows
from tangent_ops.exact.stored import Stored
from tangent_ops.fields import Inputs, call, named_tensors
from tangent_ops.model.linearized import LinearizedModel

MOST_COLUMNS = 8192  # of a core: the sums are quadratic in it


class TangentFeatures:
    """Computes `FeatureRows`, sample by sample, since the bits of a batch depend on its size.

    So a sample's features are the same bits whatever other samples there are, on one machine,
    device, number of threads and release of torch.

    Args:
        tangent: the model; its deltas are not read.
        inputs: (n, ...), some samples, on which J is compared with passes through the model.

    Attributes:
        layout: as `StatisticsMeta.layout`.
        head: as `StatisticsMeta.head`.
        columns: k.

    Raises:
        ArgumentError: inputs are not finite; the core has too many columns.
        UnsupportedError: the model mixes samples, or has no output of one row to a sample.
    """

    def __init__(self, tangent: LinearizedModel, inputs: Inputs) -> None:
        self._layout = Layout.of(tangent)
        inputs = inputs.to(self._layout.device)
        tensors = named_tensors(inputs[:CHECKED]).values()
        if not all(x.isfinite().all() for x in tensors):  # it would look as if J were wrong
            raise ArgumentError("the inputs are not finite: check the data for NaN")
        try:
            self._trunk, tail = tangent.split()
        except UnsupportedError:
            self._trunk, tail = None, tangent
        try:
            few = self._entering(inputs[:CHECKED])
        except UnsupportedError:  # found by running the trunk
            self._trunk, tail, few = None, tangent, inputs[:CHECKED]
        self._extract = Extractor(tail, few)
        self._extract.check(few)
        self.layout = layout_of({n: d.detach() for n, d in tangent.deltas().items()})
        stored = self._extract.alone(few[:1])
        self._head = next((i for i, p in enumerate(stored.parts) if _is_head(p)), None)
        head = [] if self._head is None else _names_of(stored.parts[self._head], self._layout)
        self.head = tuple(name for name, *_ in self.layout if name in head)
        where, start = [], 0
        for name, size in zip(self._layout.shapes, self._layout.sizes, strict=True):
            if name not in self.head:
                where.append(torch.arange(start, start + size))
            start += size
        self._columns = torch.cat(where) if where else torch.zeros(0, dtype=torch.int64)
        self.columns = len(self._columns)
        if self.columns > MOST_COLUMNS:
            raise ArgumentError(
                f"tangent has {self.columns:,} trained numbers outside of a linear head, more "
                f"than {MOST_COLUMNS:,}: the sums would have {self.columns**2:,} entries. "
                "Linearize with core=core_basis(model, public_data)"
            )

    def __call__(self, inputs: Inputs) -> FeatureRows:
        """f, φ and a of some samples (n, ...), on the model's device."""
        ones = inputs.to(self._layout.device).split(1)
        return FeatureRows.joined([self._of(one) for one in ones])

    def _entering(self, inputs: Inputs) -> Inputs:
        if self._trunk is None:
            return inputs
        return torch.cat([call(self._trunk, one) for one in inputs.split(1)])

    def _of(self, one: Inputs) -> FeatureRows:
        stored = self._extract.alone(self._entering(one))
        head = stored.logits.new_zeros(1, 0)
        if self._head is not None:
            head = self._inputs_of_head(stored.parts[self._head])
        return FeatureRows(stored.logits, self._rows(stored), head)

    def _inputs_of_head(self, part: Part) -> Tensor:
        assert isinstance(part, Factors)
        if not _is_head(part):
            raise ArgumentError("the head's inputs are not the same for all outputs of a sample")
        inputs = part.inputs.flatten(1)
        ones = inputs.new_ones(len(inputs), 1)
        return torch.cat(([inputs] if part.weight else []) + ([ones] if part.bias else []), dim=1)

    def _rows(self, stored: Stored) -> Tensor:
        """φ, (n, C, k)."""
        n, c = stored.logits.shape
        total = stored.logits.new_zeros(n * c, self._layout.size)
        for index, part in enumerate(stored.parts):
            if index == self._head:
                continue
            rows = part.as_rows() if isinstance(part, Factors) else part
            assert isinstance(rows, Rows)
            sizes = [place.size for place in rows.places]
            for place, some in zip(rows.places, rows.rows.split(sizes, dim=2), strict=True):
                place.of(total).add_(some.reshape(n * c, *place.shape))
        return total[:, self._columns.to(total.device)].view(n, c, -1)


def _is_head(part: Part) -> bool:
    """Whether it is a full linear map whose outputs are the model's."""
    if not isinstance(part, Factors) or (part.weight is None and part.bias is None):
        return False
    _, c, h, t, o = part.cotangents.shape
    if not (h == t == 1 and c == o):
        return False
    eye = torch.eye(c, dtype=part.cotangents.dtype, device=part.cotangents.device)
    return bool((part.cotangents[:, :, 0, 0] == eye).all())


def _names_of(part: Part, layout: Layout) -> list[str]:
    """The parameters that a head's part has all entries of, weight first."""
    assert isinstance(part, Factors)
    ends = torch.tensor(layout.sizes).cumsum(0)
    found = []
    for place in (part.weight, part.bias):
        if place is not None:
            index = int(torch.searchsorted(ends, place.offset, right=True))
            name = list(layout.shapes)[index]
            assert place.size == layout.sizes[index] and place.offset == int(
                ends[index] - layout.sizes[index]
            )
            found.append(name)
    return found
