"""The end of a message about a name that is not in a plan: what there is instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LISTED = 10
_COMPARED = 2000  # names: difflib takes about 20 µs for each


def suggestion(name: str, known: Iterable[str], what: str) -> str:
    """The nearest known names, and all of them if they are few.

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
