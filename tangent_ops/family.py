"""What tangent-ops asks about a model: its blocks, its head, and the logits of its output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.fields import Inputs, call

ATTRIBUTE = "tangent_family"
_LISTS = ("blocks", "layers", "layer", "h", "block")
_HEADS = (("cls_classifier", "distillation_classifier"), ("classifier",), ("head",), ("score",))
_WAY_OUT = (
    "set model.tangent_family to a tangent_ops.Family (docs/models.md), or name the trained "
    "parameters with a regular expression instead"
)


@runtime_checkable
class Family(Protocol):
    """Three answers about a kind of model. Set ``model.tangent_family`` to an object with them.

    The attribute may be the instance's or its class's. Models of timm and Hugging Face need none:
    `KnownNames` answers for them.
    """

    def blocks(self, model: nn.Module) -> Sequence[nn.Module] | nn.ModuleList | nn.Sequential:
        """The model's blocks, in the order in which they run; empty if it has none."""
        ...

    def head(self, model: nn.Module) -> nn.Linear | Sequence[nn.Linear] | None:
        """The linear layer that returns the logits, or several; None if there is none."""
        ...

    def logits(self, output: Any) -> Any:
        """The tensor (n, C) of what the model returns. It must be linear in that."""
        ...


class KnownNames:
    """The family of models that use timm's or Hugging Face's names.

    Blocks are ``model.blocks``, or the one list named ``layers``, ``layer``, ``blocks``, ``h`` or
    ``block`` that is in no other such list: Swin's are its stages. The head is what
    ``get_classifier()`` returns, or ``classifier``, ``head`` or ``score``, or DeiT's pair. Logits
    are the output, or its ``logits``.
    """

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The blocks; empty if there are none, or several such lists."""
        own = getattr(model, "blocks", None)
        if isinstance(own, nn.ModuleDict):
            return list(own.values())
        if isinstance(own, (nn.Sequential, nn.ModuleList)):
            return list(own)
        found = list(_outermost_lists(model))
        return found[0] if len(found) == 1 else []

    def head(self, model: nn.Module) -> nn.Linear | Sequence[nn.Linear] | None:
        """The linear head or heads."""
        get = getattr(model, "get_classifier", None)
        if callable(get):
            return _linear(get())
        for names in _HEADS:
            parts = [getattr(model, name, None) for name in names]
            if all(isinstance(part, nn.Module) for part in parts):
                # RoBERTa's head has more layers; the last one is `out_proj`.
                last = [p if isinstance(p, nn.Linear) else getattr(p, "out_proj", p) for p in parts]
                return _linear(tuple(last) if len(last) > 1 else last[0])
        return None

    def logits(self, output: Any) -> Any:
        """The output itself, or its ``logits``.

        Raises:
            UnsupportedError: a dict with other keys, as a Hugging Face model without head returns.
        """
        if not isinstance(output, Mapping):
            return output
        found = output.get("logits")
        if isinstance(found, Tensor):
            return found
        raise UnsupportedError(
            f"the model returns a {type(output).__name__} of {sorted(map(str, output))}, without "
            "logits: use the class with a head (such as ViTForImageClassification), or set "
            "model.tangent_family to a tangent_ops.Family (docs/models.md)"
        )


_KNOWN = KnownNames()


def family_of(model: nn.Module) -> Family:
    """The model's ``tangent_family``, or `KnownNames`.

    Raises:
        ArgumentError: the attribute lacks one of the three methods.
    """
    found = getattr(model, ATTRIBUTE, None)
    if found is None:
        return _KNOWN
    if isinstance(found, type) or not isinstance(found, Family):
        raise ArgumentError(
            f"{type(model).__name__}.{ATTRIBUTE} is {found!r}: expected an object with the methods "
            "blocks, head and logits of tangent_ops.Family"
        )
    return found


def logits_of(model: nn.Module, inputs: Inputs) -> Any:
    """The logits of a call of the model."""
    return family_of(model).logits(call(model, inputs))


def logits_pair(tangent: Any, inputs: Inputs) -> tuple[Any, Any]:
    """The logits' parts f(x; w0) and J(x) Δw of a `LinearizedModel`."""
    family = family_of(tangent)
    primal, slope = call(tangent.primal_and_tangent, inputs)
    return family.logits(primal), family.logits(slope)


def heads_of(model: nn.Module) -> tuple[nn.Linear, ...]:
    """The linear heads; empty if there is none."""
    found = family_of(model).head(model)
    if found is None:
        return ()
    return (found,) if isinstance(found, nn.Module) else tuple(found)


def names_of(model: nn.Module, modules: Iterable[nn.Module]) -> list[str]:
    """The names of the parameters of some of the model's modules, in the model's order."""
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]


def block_names(model: nn.Module) -> dict[str, nn.Module]:
    """The model's blocks by their names in it, in the order in which they run.

    Raises:
        UnsupportedError: the model has none.
        ArgumentError: its family names a module that is not the model's.
    """
    blocks = list(family_of(model).blocks(model))
    if not blocks:
        lists = len(list(_outermost_lists(model)))
        why = f"{lists} lists of blocks" if lists > 1 else "no `blocks`, `layers` or `layer` list"
        raise UnsupportedError(
            f"{type(model).__name__} has {why}, so it has no last blocks: {_WAY_OUT}"
        )
    names = {id(module): name for name, module in model.named_modules()}
    lost = [type(block).__name__ for block in blocks if id(block) not in names]
    if lost:
        raise ArgumentError(
            f"{type(model).__name__}'s family returns a {lost[0]} that is no module of the model"
        )
    return {names[id(block)]: block for block in blocks}


def after_blocks(model: nn.Module) -> list[str]:
    """The names of the modules that are registered after the last block."""
    parts = list(block_names(model))[-1].split(".")
    found: list[str] = []
    parent, prefix = model, ""
    for part in parts:
        children = [name for name, _ in parent.named_children()]
        later = children[children.index(part) + 1 :]
        found = [prefix + name for name in later] + found
        parent, prefix = parent.get_submodule(part), f"{prefix}{part}."
    return found


def parts_pattern(names: Iterable[str]) -> str:
    """A regular expression for the parameters of the modules with these names."""
    return rf"^({'|'.join(map(re.escape, names))})\."


def _outermost_lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    for name, child in module.named_children():
        listed = isinstance(child, (nn.ModuleList, nn.Sequential)) and name in _LISTS
        blocks = list(child.children()) if listed else []
        if blocks and all(any(True for _ in block.children()) for block in blocks):
            yield blocks
        else:
            yield from _outermost_lists(child)


def _linear(found: Any) -> nn.Linear | tuple[nn.Linear, ...] | None:
    several = isinstance(found, (tuple, list))
    layers = tuple(found) if several else (found,)
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return None
    return layers if several else layers[0]
