"""Context in which weights with factored tangents are recognised in a model's calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from tangent_ops.ops.factored import (
    Factors,
    factored_convolution,
    factored_head_linear,
    factored_linear,
)
from tangent_ops.ops.linear import head_linear

View = Callable[[Tensor], Any]

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
# Functions of a tensor that do not read its values; so are getters that return no tensor.
_DESCRIBING = frozenset(
    (Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.__len__, Tensor.is_contiguous)
)
_GETTERS: Any = Tensor
_MT = _GETTERS.mT.__get__
_TRANSPOSING = frozenset(
    (_MT, _GETTERS.T.__get__, Tensor.t, torch.t, Tensor.transpose, torch.transpose)
)
_RESHAPING = frozenset((Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten))
_DIVIDING = frozenset((Tensor.chunk, torch.chunk, Tensor.split, torch.split))
_VIEWS = _TRANSPOSING | _RESHAPING | _DIVIDING | {Tensor.__getitem__}
_OPERANDS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class factored_calls(TorchFunctionMode):  # noqa: N801 - used like torch.no_grad
    """Context in which the tangents L T R of some weights are not multiplied out.

    ``F.linear``, convolutions of one group and :func:`tangent_ops.ops.linear.head_linear` compute
    with the factors, also for rows of a weight (slices, ``chunk``, ``split``), for rows by head
    (``view``), and ``head_linear`` for their transposes. Any other function gets W + L T R,
    multiplied out at the first such call, and from then on all functions do.

    Torch function modes do not see some calls, such as that of a ``torch.autograd.Function``. These
    get what stands for the weight: give it a tangent of NaN, so that no result is silently wrong.

    Args:
        weights: (what stands for the weight in the model, the weight, its factors).
    """

    def __init__(self, weights: Iterable[tuple[Tensor, Tensor, Factors]]):
        super().__init__()
        # By id, which is unique as long as the tensor lives: `_Weight` holds it.
        self._known: dict[int, _Weight] = {}
        for stand_in, weight, factors in weights:
            root = _Root(weight, factors)
            self._learn(_Weight(root, stand_in, weight, factors.to(weight.dtype)))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not (self._holds(args) or self._holds(kwargs.values())) or func in _DESCRIBING:
            return func(*args, **kwargs)
        found = self._in_factors(func, args, kwargs)
        if found is None and getattr(func, "__name__", "") == "__get__":
            found = func(*args, **kwargs)
            if not isinstance(found, Tensor):  # shape, dtype, requires_grad, ...
                return found
            found = None
        if found is None:
            args, kwargs = tree_map(self._multiplied, (args, kwargs))
            found = func(*args, **kwargs)
        return found

    def _in_factors(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The result by the factors, or None if they do not give it."""
        first = self._known.get(id(args[0])) if args else None
        if first is not None:
            return None if first.root.full is not None else self._view(first, func, args, kwargs)
        if func is not F.linear and func is not head_linear and func not in _CONVOLUTIONS:
            return None
        call = dict(zip(_OPERANDS, args, strict=False)) | dict(kwargs)
        weight = self._known.get(id(call.pop("weight", None)))
        if weight is None or weight.root.full is not None or self._holds(call.values()):
            return None
        if func is head_linear:
            if weight.plain.ndim != 3:
                return None
            bias = call.get("bias")
            return factored_head_linear(
                call["input"], weight.plain, bias, weight.factors, weight.transposed
            )
        if weight.transposed:
            return None
        if func is F.linear:
            if weight.plain.ndim != 2:
                return None
            return factored_linear(call["input"], weight.plain, call.get("bias"), weight.factors)
        if call.pop("groups", 1) != 1 or isinstance(call.get("padding"), str):
            return None
        if not call["input"].ndim == weight.plain.ndim == _CONVOLUTIONS.index(func) + 3:
            return None
        return factored_convolution(func, weight.factors, weight=weight.plain, **call)

    def _view(self, weight: _Weight, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """A view of a weight by rows, or transposed; None for any other function."""
        if func not in _VIEWS or not torch.is_grad_enabled():  # without: a constant
            return None

        def view(tensor: Tensor) -> Any:
            return func(tensor, *args[1:], **kwargs)

        plain = view(weight.plain)
        factors = _factors_of_view(weight, func, args, kwargs, plain)
        if factors is None:
            return None
        turned = weight.transposed ^ (func in _TRANSPOSING)
        if isinstance(plain, Tensor):
            return self._learn(weight.seen(view, view(weight.stand_in), plain, factors[0], turned))
        parts = zip(view(weight.stand_in), plain, factors, strict=True)
        return tuple(
            self._learn(weight.seen(lambda x, i=i: view(x)[i], *part, turned))
            for i, part in enumerate(parts)
        )

    def _learn(self, weight: _Weight) -> Tensor:
        self._known[id(weight.stand_in)] = weight
        return weight.stand_in

    def _holds(self, values: Iterable[Any]) -> bool:
        for value in values:
            if id(value) in self._known:
                return True
            if isinstance(value, (tuple, list)) and self._holds(value):
                return True
        return False

    def _multiplied(self, value: Any) -> Any:
        weight = self._known.get(id(value))
        return value if weight is None else weight.multiplied()


class _Root:
    """A weight as the model has it, and W + L T R once it is multiplied out."""

    def __init__(self, weight: Tensor, factors: Factors):
        self._weight, self._factors = weight, factors
        self.full: Tensor | None = None

    def multiply(self) -> Tensor:
        if self.full is None:
            product = self._factors.product(self._weight.shape)
            self.full = self._weight + product.to(self._weight.dtype)
        return self.full


@dataclass(frozen=True)
class _Weight:
    """A weight, or a view of one.

    Attributes:
        root: what it is a view of.
        stand_in: what the model has.
        plain: its value, without a tangent.
        factors: in its dtype; the factor of the rows is shaped as the rows.
        transposed: whether the factors are those of ``plain.mT``.
        views: the functions that make it from the whole.
    """

    root: _Root
    stand_in: Tensor
    plain: Tensor
    factors: Factors
    transposed: bool = False
    views: tuple[View, ...] = ()

    def seen(
        self, view: View, stand_in: Tensor, plain: Tensor, factors: Factors, transposed: bool
    ) -> _Weight:
        return _Weight(self.root, stand_in, plain, factors, transposed, (*self.views, view))

    def multiplied(self) -> Tensor:
        with torch.enable_grad():  # the model may have switched derivatives off for now
            full = self.root.multiply()
            for view in self.views:
                full = view(full)
        return full


def _factors_of_view(
    weight: _Weight, func: Any, args: Any, kwargs: Mapping[str, Any], plain: Any
) -> list[Factors] | None:
    """The factors of each part of the view; None if it takes columns apart."""
    dims = weight.plain.ndim
    if func in _TRANSPOSING:
        given = [d % dims for d in (*args[1:], *kwargs.values())]
        turns = sorted(given) == [dims - 2, dims - 1] if given else dims == 2 or func == _MT
        return [weight.factors] if turns else None
    if weight.transposed or dims != 2:
        return None
    trained, right, left = weight.factors
    rows = trained if left is None else left
    if func in _RESHAPING:
        by_head = plain.ndim == 3 and plain.shape[-1] == weight.plain.shape[-1]
        parts = [rows.view(*plain.shape[:-1], rows.shape[-1])] if by_head else None
    elif func in _DIVIDING:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        parts = func(rows, *args[1:], **kwargs) if dim in (0, -2) else None
    else:
        first, *others = args[1] if isinstance(args[1], tuple) and args[1] else (args[1],)
        key = first if all(k == slice(None) for k in others) else None
        parts = [rows[key]] if isinstance(key, slice) else None
    if parts is None:
        return None
    return [
        Factors(part, right) if left is None else Factors(trained, right, part) for part in parts
    ]
