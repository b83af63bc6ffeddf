"""`head_statistics`: the sums that determine the head's optimum, given the other deltas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tangent_ops.composition.fixed_terms import add_samples
from tangent_ops.composition.head import AT_ANCHOR, BLOCK, block_fingerprint
from tangent_ops.composition.ridge import FeatureRows
from tangent_ops.composition.statistics import (
    FRACTION_BITS,
    StatisticsMeta,
    TangentStatistics,
    layout_of,
)
from tangent_ops.data import Data, check_integer, in_order, place, unpack
from tangent_ops.delta import (
    DeltaLike,
    DeltaMeta,
    check_anchor,
    check_kind,
    check_layout,
    check_values,
    open_delta,
)
from tangent_ops.errors import UnsupportedError
from tangent_ops.exact.collect import READ, SquareTargets
from tangent_ops.exact.problem import check_tangent
from tangent_ops.exact.progress import progress_bar
from tangent_ops.family import family_of, logits_pair
from tangent_ops.fields import Inputs, call
from tangent_ops.losses import Loss, RescaledSquareLoss, loss_name
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.ops.levels import functional_call


def head_statistics(
    tangent: LinearizedModel,
    data: Data,
    delta: DeltaLike | None = None,
    *,
    loss: Loss | None = None,
    fraction_bits: int = FRACTION_BITS,
    batch_size: int = READ,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> TangentStatistics:
    """Statistics of a shard in the columns of the linear head alone, for `compose(how="head")`.

    They are Σ a aᵀ of the head's inputs a, Σ r aᵀ and Σ ‖r‖², with the residuals
    r = y - f(x) - J(x) b at the delta b of all parameters but the head's. One Jacobian-vector
    product per sample. Like `statistics`, they reveal data.

    Args:
        tangent: the model, whose head, one linear layer that returns the outputs, is trained with a
            full delta. Its own deltas are neither read nor changed.
        data: the shard: a Dataset of (input, target), or a DataLoader; read in order.
        delta: b, the mean of all shards' deltas, or the path of its file; its head is not read.
            None for b = 0, the anchor.
        loss: `RescaledSquareLoss()` (None), with k = 1, or `torch.nn.MSELoss()`.
        fraction_bits: as in `statistics`.
        batch_size: of a Dataset; a DataLoader has its own.
        device: the model is moved there first.
        progress: show a bar if it takes more than two seconds.

    Raises:
        ArgumentError: an argument is not as above.
        DeltaError: the delta does not fit the model.
        DeltaFileError: a file is truncated, was edited or is not a delta file.
        UnsupportedError: another loss; a model without such a head.
        StatisticsError: outputs are not finite, or the sums are out of range.
    """
    check_tangent(tangent)
    check_integer("fraction_bits", fraction_bits, 1)
    loss = RescaledSquareLoss() if loss is None else loss
    targets_of = SquareTargets(loss)
    loader = in_order(data, batch_size)
    where = place(tangent, device)
    total = reader = None
    with progress_bar("statistics of the head", "batch", len(loader), progress) as bar:
        for batch in loader:
            inputs, targets = unpack(batch, where)
            if reader is None or total is None:
                reader = _Reader(tangent, delta, inputs[:1])
                outputs = reader.rows(inputs[:1]).outputs.shape[1]
                meta = reader.meta(outputs, loss_name(loss), fraction_bits)
                total = TangentStatistics.zero(meta, labelled=targets_of.are_classes)
            rows = reader.rows(inputs)
            residuals = targets_of.values(targets, rows.outputs) - rows.outputs
            labels = targets.cpu() if targets_of.are_classes else None
            add_samples(total, rows, residuals, labels)
            bar.update()
    assert total is not None
    total.sort_list()
    return total


class _Reader(nn.Module):
    """Computes f + J b and the head's inputs, sample by sample, as `TangentFeatures` does."""

    def __init__(self, tangent: LinearizedModel, delta: DeltaLike | None, one: Inputs) -> None:
        super().__init__()
        self.tangent = tangent
        own = tangent.deltas()
        name, self._linear = _find_head(tangent, one)
        self._head = [n for n in (f"{name}.weight", f"{name}.bias") if n in own]
        self._block = AT_ANCHOR
        block = {}
        if delta is not None:
            found = _checked(tangent, delta)
            self._block = block_fingerprint(found, self._head)
            block = {n: found[n].to(p) for n, p in own.items() if n not in self._head}
        self._given = {
            f"tangent.delta.{n}": block.get(n, torch.zeros_like(p)) for n, p in own.items()
        }

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return logits_pair(self.tangent, inputs)

    def meta(self, outputs: int, loss: str, fraction_bits: int) -> StatisticsMeta:
        tangent, own = self.tangent, self.tangent.deltas()
        delta = DeltaMeta(
            tangent.fingerprint,
            tangent.model_name,
            tangent.trainable,
            loss=loss,
            rank=tangent.rank,
            basis=tangent.basis_fingerprint,
            extra={BLOCK: self._block},
        )
        layout = layout_of({name: own[name].detach() for name in self._head})
        return StatisticsMeta(
            delta, layout, tuple(self._head), outputs, fraction_bits=fraction_bits
        )

    @torch.no_grad()
    def rows(self, inputs: Inputs) -> FeatureRows:
        """f + J b (n, C), no columns of a core, and a (n, h)."""
        return FeatureRows.joined([self._of(one) for one in inputs.split(1)])

    def _of(self, one: Inputs) -> FeatureRows:
        seen: list[Tensor] = []
        hook = self._linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            outputs, effect = functional_call(self, self._given, (one,))
        finally:
            hook.remove()
        entering = seen[-1].detach()
        parts = []
        if any(name.endswith(".weight") for name in self._head):
            parts.append(entering)
        if any(name.endswith(".bias") for name in self._head):
            parts.append(entering.new_ones(1, 1))
        total = outputs + effect
        return FeatureRows(total, total.new_zeros(*total.shape, 0), torch.cat(parts, dim=1))


def _checked(tangent: LinearizedModel, item: DeltaLike) -> Mapping[str, Tensor]:
    delta, what = open_delta(item, 0)
    meta = getattr(delta, "meta", None)
    check_anchor(meta, tangent.fingerprint, tangent.model_name, what)
    check_kind(meta, tangent.rank, tangent.basis_fingerprint, what)
    check_values(delta, what)
    check_layout(delta, tangent.deltas(), what)
    return delta


def _find_head(tangent: LinearizedModel, one: Inputs) -> tuple[str, nn.Linear]:
    """The trained linear layer that returns the model's outputs, and its name."""
    made: list[tuple[str, nn.Linear, Tensor]] = []

    def watched(name: str, linear: nn.Linear) -> RemovableHandle:
        def note(_module: nn.Module, _inputs: object, output: Any) -> None:
            made.append((name, linear, output))

        return linear.register_forward_hook(note)

    modules = tangent.anchor.named_modules()
    hooks = [watched(name, module) for name, module in modules if isinstance(module, nn.Linear)]
    try:
        with torch.no_grad():
            outputs = family_of(tangent).logits(call(tangent.anchor, one))
    finally:
        for hook in hooks:
            hook.remove()
    own = tangent.deltas()
    for name, linear, output in made:
        shapes = {f"{name}.{n}": p.shape for n, p in linear.named_parameters()}
        trained = {n: shape for n, shape in shapes.items() if n in own}
        full = all(own[n].shape == shape for n, shape in trained.items())
        if output is outputs and output.ndim == 2 and trained and full:
            return name, linear
    raise UnsupportedError(
        "the model's outputs are not those of one linear layer that is trained with a full delta: "
        "train its head, or use compose_lossless"
    )
