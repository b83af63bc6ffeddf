"""What a forward pass used: the calls of linear maps by trained weights, and of other modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from tangent_ops.exact.parts import Place
from tangent_ops.exact.weights import Use, Weight
from tangent_ops.ops.linear import head_linear


@dataclass
class MapCall:
    """A call of a linear map by a trained weight, a trained bias, or both."""

    names: frozenset[str]
    weight: Use | None
    bias: Use | None
    heads: bool
    inputs: Tensor
    output: torch.Size
    edge: GradientEdge

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """H, T, K and O of one sample."""
        _, h, t, k = self.activations(1).shape
        return h, t, k, self.cotangents(self.inputs.new_zeros(1, *self.output), 1).shape[-1]

    @property
    def places(self) -> tuple[Place | None, Place | None]:
        """Of weight and bias, with heads."""
        weight = None if self.weight is None else self.weight.place.heads(2)
        return weight, None if self.bias is None else self.bias.place.heads(1)

    def activations(self, count: int) -> Tensor:
        """(n, H, T, K)."""
        return self._rows(self.inputs, count, self.weight and self.weight.inputs)

    def cotangents(self, found: Tensor, count: int) -> Tensor:
        """(n, C, H, T, O) of (C, ...)."""
        side = self.weight and self.weight.cotangents
        return torch.stack([self._rows(one, count, side) for one in found], dim=1)

    def _rows(self, tensor: Tensor, count: int, side: Tensor | None) -> Tensor:
        width = tensor.shape[-1]
        if self.heads:
            rows = tensor.reshape(count, -1, tensor.shape[-2], width).transpose(1, 2)
        else:
            rows = tensor.reshape(count, 1, -1, width)
        rows = rows if side is None else rows.to(side.dtype) @ side
        return rows.flatten(1, 2)[:, None] if self.weight and self.weight.merged else rows


@dataclass
class Used:
    """What a forward pass used."""

    maps: list[MapCall] = field(default_factory=list)
    modules: list[tuple[str, Tensor, GradientEdge]] = field(default_factory=list)
    leaves: dict[str, Tensor] = field(default_factory=dict)
    output: Any = None

    def hook(self, name: str) -> Callable:
        def tap(module: nn.Module, inputs: tuple, keywords: dict, output: object) -> object:
            one = len(inputs) == 1 and not keywords and isinstance(inputs[0], Tensor)
            if not one or not isinstance(output, Tensor) or len(inputs[0]) != len(output):
                return output
            output, edge = _tapped(output)
            self.modules.append((name, inputs[0].detach(), edge))
            return output

        return tap


class Recording(TorchFunctionMode):
    """Records the calls of linear maps by trained weights."""

    def __init__(self, maps: list[MapCall], weights: Mapping[str, Weight]) -> None:
        super().__init__()
        self._maps = maps
        self._weights = weights

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func not in (F.linear, head_linear):
            return output
        return self._record(output, func is head_linear, *args, **kwargs)

    def _record(
        self, output: Tensor, heads: bool, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        uses = [self._use(weight), self._use(bias)]
        if not any(uses):
            return output
        output, edge = _tapped(output)
        seen = (heads, input.detach(), output.shape, edge)
        of_weight, of_bias = uses
        if of_weight and of_bias and of_weight[1].cotangents is None:
            names = frozenset((of_weight[0], of_bias[0]))
            self._maps.append(MapCall(names, of_weight[1], of_bias[1], *seen))
            return output
        # Apart, since the weight's cotangents are projected.
        if of_weight:
            self._maps.append(MapCall(frozenset((of_weight[0],)), of_weight[1], None, *seen))
        if of_bias:
            self._maps.append(MapCall(frozenset((of_bias[0],)), None, of_bias[1], *seen))
        return output

    def _use(self, tensor: Tensor | None) -> tuple[str, Use] | None:
        if tensor is None:
            return None
        for name, weight in self._weights.items():
            use = weight.use(tensor)
            if use is not None:
                return name, use
        return None


def _tapped(output: Tensor) -> tuple[Tensor, GradientEdge]:
    """The output and its place in the graph, which later changes in place do not move."""
    if not output.requires_grad:
        output = output.detach().requires_grad_().clone()
    return output, get_gradient_edge(output)


def grouped(maps: list[MapCall]) -> list[list[MapCall]]:
    """The calls of the same map together."""
    groups: dict[Any, list[MapCall]] = {}
    for call in maps:
        groups.setdefault(call.places, []).append(call)
    return list(groups.values())


def covered_by(
    maps: list[MapCall],
    weights: Mapping[str, Weight],
    size: int,
    without: set[str],
    cores: set[str],
) -> tuple[set[str], set[str]]:
    """The parameters that linear maps use, and the cores among them that several maps share.

    No entry of another parameter is shared by two different maps.
    """
    counts = torch.zeros(1, size, dtype=torch.uint8)
    for places in {call.places for call in maps}:
        for place in places:
            if place is not None:
                place.of(counts).add_(1)
    named = {name for call in maps for name in call.names}
    shared = {name for name in named if weights[name].place.of(counts).max() != 1}
    lost = (shared - cores) | without
    while more := {n for call in maps if call.names & lost for n in call.names} - lost:
        lost |= more  # a map is used as a whole, or not at all
    return named - lost, (shared & cores) - lost
