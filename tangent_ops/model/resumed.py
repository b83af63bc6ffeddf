"""Splits any model between two of its blocks: the tail is the model's own forward pass, resumed.

The tail calls the model with an input of ones, and each of its lower blocks returns the tokens
unread. So pooling, norms and heads are the model's own code, whatever they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.family import Family, block_names, family_of
from tangent_ops.fields import Inputs, call, each_tensor, named_tensors

_WITHOUT = "Train without a feature cache."


class ResumedTail(nn.Module):
    """The part of a model from block ``start`` on: tokens in, what the model returns out.

    Its parameters are the model's own, under the model's own names. It runs after its trunk has
    seen a batch (`learn`), from which it knows the shapes of the inputs, and nothing else.

    Args:
        model: the model.
        start: index of the first block that belongs to the tail, at least 1.

    Attributes:
        tangent_family: the model's.
    """

    def __init__(self, model: nn.Module, start: int) -> None:
        super().__init__()
        self.tangent_family: Family = family_of(model)
        self._given = _Given()
        lower = list(block_names(model).items())[:start]
        within = _with(model, {name: _StandIn(block, self._given) for name, block in lower})
        for name, child in within.named_children():
            self.add_module(name, child)
        self._parameters, self._buffers = within._parameters, within._buffers
        self._within = [within]  # not registered: the names would differ from the model's
        self._ones: Inputs | None = None

    def learn(self, inputs: Inputs, output: Any) -> None:
        """Take the shapes of the model's inputs, and of the last lower block's output."""
        self._ones = each_tensor(inputs, lambda x: torch.ones_like(x[:1]))
        self._given.learn(output)

    def forward(self, tokens: Tensor) -> Any:
        """What the model returns."""
        if self._ones is None:
            raise ArgumentError("a tail runs after its trunk, which finds out what the inputs are")
        weight = next((p for p in self.parameters() if p.is_floating_point()), tokens)

        def there(x: Tensor) -> Tensor:
            return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)

        self._given.tokens = tokens
        try:
            return call(self._within[0], each_tensor(self._ones, there))
        finally:
            self._given.tokens = None


class _Given:
    """The tokens of a call, and what the last lower block returns beside them."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self._rest: tuple[list[Any], TreeSpec] | None = None

    def learn(self, output: Any) -> None:
        _, rest, spec = taken_apart(output)
        # Zeros, as no value of a sample may stay; a wrong one would be found by the check.
        self._rest = ([torch.zeros_like(x[:1]) if isinstance(x, Tensor) else x for x in rest], spec)

    def output(self) -> Any:
        assert self._rest is not None
        rest, spec = self._rest
        return tree_unflatten([self.tokens, *rest], spec)


class _StandIn(nn.Module):
    """Stands for a lower block: returns the tokens, as the last of these blocks does.

    It has the block's plain attributes, and True for each submodule, since a model may ask whether
    one is None, as Swin does.
    """

    def __init__(self, block: nn.Module, given: _Given) -> None:
        super().__init__()
        own = {name: value for name, value in vars(block).items() if not name.startswith("_")}
        parts = {name: None if child is None else True for name, child in block._modules.items()}
        vars(self).update({**own, **parts, "training": False})
        vars(self).pop("forward", None)
        self._given = given

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._given.output()


def taken_apart(output: Any) -> tuple[Tensor, list[Any], TreeSpec]:
    """A block's output: the tokens, which come first, and what it returns beside them.

    Raises:
        UnsupportedError: it does not begin with a tensor.
    """
    leaves, spec = tree_flatten(output)
    if not leaves or not isinstance(leaves[0], Tensor):
        raise UnsupportedError(
            f"this model cannot be split: its blocks return a {type(output).__name__} that does "
            f"not begin with a tensor. {_WITHOUT}"
        )
    return leaves[0], leaves[1:], spec


def differs_by_sample(inputs: Inputs) -> bool:
    """Whether inputs may tell a model which tokens to read: a check of one batch is not enough."""
    tensors = named_tensors(inputs).values()
    return len(tensors) > 1 or not all(x.is_floating_point() for x in tensors)


def check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedError if a block gets tensors beside the tokens, as masks of padding are."""
    names = [f"argument {i}" for i, x in enumerate(args[1:], 1) if _has_tensor(x)]
    names += [name for name, x in kwargs.items() if _has_tensor(x)]
    if names:
        raise UnsupportedError(
            f"this model cannot be split: its blocks take more than the tokens ({names[0]} is a "
            f"tensor, such as a mask of padding). {_WITHOUT}"
        )


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _with(module: nn.Module, stand_ins: Mapping[str, nn.Module]) -> Any:
    """The module with others in the place of some descendants; all the rest is shared."""
    changed = copy.copy(module)
    changed._modules = dict(module._modules)
    for name in {path.partition(".")[0] for path in stand_ins}:
        inside = {
            path.partition(".")[2]: each
            for path, each in stand_ins.items()
            if path.partition(".")[0] == name
        }
        changed._modules[name] = (
            inside[""] if "" in inside else _with(getattr(module, name), inside)
        )
    return changed
