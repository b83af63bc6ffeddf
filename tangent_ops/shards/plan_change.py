"""Says how an entry of a plan differs from the one that was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_LONGEST = 40


def plan_change(key: str, there: str, now: str) -> str:
    """What differs between a plan's entry and the one asked for, in words."""
    if key == "anchor":
        return "another anchor (model, weights, classes or public images)"
    if key == "public":
        return "other public images"
    if key == "overlap":
        return f"allow_overlap={there}, not {now}"
    return f"another recipe: {differing(json.loads(there), json.loads(now))}"


def differing(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The entries that differ, with both values."""
    names = sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name))
    found = [f"{name}={_plain(there.get(name))}, not {_plain(now.get(name))}" for name in names]
    return "; ".join(found)


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str) and len(value) > _LONGEST:  # a hash
        return f"{value[:12]}…"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
