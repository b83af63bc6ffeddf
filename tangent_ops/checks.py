"""Checks of argument values that every part uses; it needs nothing but Python."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from tangent_ops.errors import ArgumentError


def check_integer(name: str, value: object, low: int) -> None:
    """Raise ArgumentError unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ArgumentError(f"{name} must be an integer of at least {low}, got {value!r}")


def check_choice(
    name: str, value: object, choices: Mapping[str, Any] | Sequence[str], rest: str = ""
) -> None:
    """Raise ArgumentError unless `value` is one of `choices`."""
    if not (isinstance(value, str) and value in choices):
        raise ArgumentError(f"{name} must be one of {[*choices]}{rest}, got {value!r}")


def check_positive(**values: float) -> None:
    """Raise ArgumentError, naming it, for a value that is not finite and positive."""
    for name, value in values.items():
        if not (_is_finite(value) and value > 0):
            raise ArgumentError(f"{name} must be positive and finite, got {value!r}")


def check_not_negative(**values: float) -> None:
    """Raise ArgumentError, naming it, for a value that is not finite, or negative."""
    for name, value in values.items():
        if not (_is_finite(value) and value >= 0):
            raise ArgumentError(f"{name} must be finite and not negative, got {value!r}")


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
