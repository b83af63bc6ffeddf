"""Which parameters of a model are trained."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from tangent_ops.errors import ArgumentError

Trainable = str | Callable[[str], bool] | None


def choose(anchor: nn.Module, trainable: Trainable) -> set[str]:
    """Names of the parameters to train.

    Raises:
        ArgumentError: there are none, or ``trainable`` is no pattern.
    """
    # Tied parameters may be chosen by any of their names; their delta has the first.
    first: dict[int, str] = {}
    candidates = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in anchor.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point()
    }
    if not candidates:
        raise ArgumentError(f"{type(anchor).__name__} has no floating-point parameter")
    if trainable is None:
        return set(candidates.values())
    if isinstance(trainable, str):
        try:
            matches = re.compile(trainable).search
        except re.error as error:
            raise ArgumentError(
                f"trainable={trainable!r} is no regular expression: {error}"
            ) from error
    elif callable(trainable):
        matches = trainable
    else:
        raise ArgumentError(
            f"trainable={trainable!r}: expected None, a regular expression as a str, or a function"
        )
    chosen = {own for name, own in candidates.items() if matches(name)}
    if not chosen:
        raise ArgumentError(
            f"trainable={pattern_text(trainable)!r} matches no parameter; names look like "
            f"{_some(sorted(candidates))}"
        )
    return chosen


def pattern_text(trainable: Trainable) -> str:
    """The choice in words, for a delta's record."""
    if trainable is None:
        return "all"
    if isinstance(trainable, str):
        return trainable
    return getattr(trainable, "__qualname__", repr(trainable))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
