"""Lets a package offer public names without importing the modules that they are in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazy(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions ``__getattr__`` and ``__dir__`` of a package (PEP 562).

    A name's module is imported when the name is first asked for; so is a submodule, by its own
    name. Python's import lock makes this safe among threads. Type checkers do not follow it: the
    package has the same imports under ``TYPE_CHECKING``.

    Args:
        package: its ``__name__``.
        modules: module, relative to the package -> names that it defines, separated by spaces.
    """
    where = {name: f"{package}.{module}" for module in modules for name in modules[module].split()}

    def get(name: str) -> Any:
        if name in where:
            found = getattr(import_module(where[name]), name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            found = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, found)
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *where})

    return get, names
