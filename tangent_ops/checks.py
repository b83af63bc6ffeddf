"""Checks of argument values that every part uses; it needs nothing but Python."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from tangent_ops.errors import ArgumentError

_LISTED = 10
_COMPARED = 2000  # names: difflib takes about 20 µs for each


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


def suggestion(name: str, known: Iterable[str], what: str) -> str:
    """The end of a message about a name that a plan or a ledger does not have: what there is.

    The nearest known names, and all of them if they are few.

    Args:
        name: the unknown one.
        known: the names that there are.
        what: they are, in the plural.
    """
    known = list(known)
    if not known:
        return f"; it has no {what}"
    end = name.rpartition("/")[2].lower()
    close = [one for one in known if one.rpartition("/")[2].lower() == end][:3]
    if not close and len(known) <= _COMPARED:
        lowered = {one.lower(): one for one in known}
        found = difflib.get_close_matches(name.lower(), lowered, n=3)
        close = [lowered[one] for one in found]
    words = f": did you mean {' or '.join(map(repr, close))}?" if close else "."
    if len(known) <= _LISTED:
        words += f" Its {what} are {', '.join(map(repr, known))}"
    elif not close:
        words += f" It has {len(known)} {what}, such as {known[0]!r}"
    return words
