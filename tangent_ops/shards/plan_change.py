"""Says how an entry of a plan differs from the one that was asked for."""

from __future__ import annotations

import json
from typing import Any


def plan_change(key: str, there: str, now: str) -> str:
    """What differs between a plan's entry and the one asked for, in words."""
    if key == "anchor":
        return "another anchor (model, weights, classes or public images)"
    if key == "public":
        return "other public images"
    if key == "overlap":
        return f"allow_overlap={there}, not {now}"
    old, new = json.loads(there), json.loads(now)
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    found = [f"{name}={_plain(old.get(name))}, not {_plain(new.get(name))}" for name in names]
    return f"another recipe: {'; '.join(found)}"


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
