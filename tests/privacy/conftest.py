"""Tests of privacy need its extra; where it is not installed, they are not collected."""

from __future__ import annotations

import importlib.util

NEEDED = ("opacus", "dp_accounting", "scipy")

collect_ignore_glob = (
    ["test_*.py"] if any(importlib.util.find_spec(name) is None for name in NEEDED) else []
)
