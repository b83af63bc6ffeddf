"""`Fields`: the inputs of a batch that have names, as Hugging Face's models take them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tangent_ops.errors import ArgumentError


class Fields:
    """Tensors of one batch by name; a model is called with them as keyword arguments.

    Indices, slices and loops are over the samples, as with a tensor.

    Args:
        tensors: name -> (n, ...); at least one, and n is the same for all.

    Attributes:
        tensors: as given.

    Raises:
        ArgumentError: there is none, one has no dimension, or their lengths differ.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        sizes = {name: tuple(x.shape) for name, x in self.tensors.items()}
        if not sizes:
            raise ArgumentError("a batch has no input: it has no field but its labels")
        if any(not size for size in sizes.values()) or len({s[0] for s in sizes.values()}) > 1:
            raise ArgumentError(f"the fields of a batch must have one batch size, got {sizes}")

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, index: int | slice | Tensor) -> Fields:
        """The samples at these indices; of one index, without the batch dimension."""
        found = {name: x[index] for name, x in self.tensors.items()}
        if isinstance(index, int):
            alone = object.__new__(Fields)  # a sample has no batch size
            alone.tensors = found
            return alone
        return Fields(found)

    def __iter__(self) -> Iterator[Fields]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Fields({ {name: tuple(x.shape) for name, x in self.tensors.items()} })"

    @property
    def device(self) -> torch.device:
        """Of the first tensor."""
        return self._first.device

    @property
    def shape(self) -> tuple[Any, ...]:
        """Name and shape of each tensor, which batches must share to be joined."""
        return tuple((name, tuple(x.shape)) for name, x in sorted(self.tensors.items()))

    @property
    def dtype(self) -> tuple[Any, ...]:
        """Name and dtype of each tensor."""
        return tuple((name, x.dtype) for name, x in sorted(self.tensors.items()))

    def map(self, function: Callable[[Tensor], Tensor]) -> Fields:
        """The function of each tensor, under the same names."""
        return Fields({name: function(x) for name, x in self.tensors.items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Fields:
        """The same on another device."""
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def split(self, size: int) -> list[Fields]:
        """Parts of `size` samples; the last one may be smaller."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def tensor_split(self, parts: int) -> list[Fields]:
        """So many parts, sized as those of `torch.Tensor.tensor_split`."""
        columns = {name: x.tensor_split(parts) for name, x in self.tensors.items()}
        return [Fields({n: column[i] for n, column in columns.items()}) for i in range(parts)]

    @property
    def _first(self) -> Tensor:
        return next(iter(self.tensors.values()))


Inputs: TypeAlias = Tensor | Fields


def call(function: Callable[..., Any], inputs: Inputs) -> Any:
    """Call a model with a batch: with a tensor, or with the fields as keyword arguments.

    Raises:
        ArgumentError: the model does not take a field.
    """
    if not isinstance(inputs, Fields):
        return function(inputs)
    taken = _named_inputs(getattr(function, "__self__", function))
    unknown = [name for name in inputs.tensors if taken and name not in taken]
    if unknown:
        raise ArgumentError(
            f"the model does not take the field {unknown[0]!r} of the dict "
            f"{sorted(inputs.tensors)}: it takes {', '.join(taken)}. It is called with every field "
            "but the labels: leave the others out, rename them, or name them in the model's forward"
        )
    return function(**inputs.tensors)


def _named_inputs(model: object) -> tuple[str, ...]:
    """The names of a model's inputs; of a wrapper of ours or torch's, those of the model in it."""
    if found := _named_arguments(type(model)):
        return found
    if not type(model).__module__.startswith(("tangent_ops.", "torch.")):
        return ()
    around = (getattr(model, name, None) for name in ("anchor", "model", "module"))
    return next((_named_inputs(inner) for inner in around if inner is not None), ())


@cache
def _named_arguments(kind: type) -> tuple[str, ...]:
    """The named arguments of a model's ``forward``. It ignores what only its ``**kwargs`` takes."""
    forward = getattr(kind, "forward", None)
    found = inspect.signature(forward).parameters.values() if forward is not None else ()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(each.name for each in found if each.kind in by_name and each.name != "self")


def named_tensors(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of a batch by name; a batch that is one tensor has the name ""."""
    return dict(inputs.tensors) if isinstance(inputs, Fields) else {"": inputs}


def each_tensor(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """The function of the tensor, or of each field."""
    return inputs.map(function) if isinstance(inputs, Fields) else function(inputs)


def same(one: Inputs, other: Inputs) -> bool:
    """Whether two batches are equal."""
    own, others = named_tensors(one), named_tensors(other)
    return own.keys() == others.keys() and all(torch.equal(own[n], others[n]) for n in own)
