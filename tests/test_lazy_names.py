"""Packages whose names are lazy: what type checkers see is what Python finds."""

from __future__ import annotations

import ast
import importlib
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in (ROOT / "tangent_ops").rglob("__init__.py")
    if "= lazy(" in path.read_text(encoding="utf-8")
)


def imported(package: str) -> Any:
    """The package; its test is skipped where an extra that it needs is missing."""
    if package.startswith("tangent_ops.privacy"):
        for needed in ("opacus", "dp_accounting"):
            pytest.importorskip(needed, reason="the extra for privacy is not installed")
    return importlib.import_module(package)


def seen_by_type_checkers(package: str) -> dict[str, str]:
    """Name -> module of the imports under ``TYPE_CHECKING``."""
    file = importlib.import_module(package).__file__
    assert file is not None
    (block,) = (
        node
        for node in ast.parse(Path(file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    return {
        alias.name: node.module or ""
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_there_are_lazy_packages() -> None:
    assert {"tangent_ops", "tangent_ops.shards", "tangent_ops.exact"} <= {*PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_names(package: str) -> None:
    """All names are found, where type checkers look for them, and none hides a module."""
    module, expected = imported(package), seen_by_type_checkers(package)
    assert sorted(expected) == sorted(module.__all__)
    for name, where in expected.items():
        home = importlib.import_module(where)
        found = getattr(home, name, None) or importlib.import_module(f"{where}.{name}")
        assert getattr(module, name) is found
        assert name in dir(module)
        modules = {path.stem for path in Path(module.__path__[0]).iterdir()}
        assert name not in modules or where == package


@pytest.mark.parametrize("package", PACKAGES)
def test_unknown_name(package: str) -> None:
    module = imported(package)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'lineraize'"):
        _ = module.lineraize
    with pytest.raises(ImportError, match="cannot import name 'lineraize'"):
        exec(f"from {package} import lineraize")
    assert not hasattr(module, "__wrapped__")


USES = """
import sys, threading
import tangent_ops
assert "torch" not in sys.modules
assert issubclass(tangent_ops.errors.ArgumentError, ValueError)
assert "torch" not in sys.modules
found, start = [], threading.Barrier(4)
def look():
    start.wait()
    found.append((tangent_ops.linearize, tangent_ops.exact.Problem, tangent_ops.statistics))
threads = [threading.Thread(target=look) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == 4 and len(set(found)) == 1
from tangent_ops import *
assert linearize is found[0][0] and statistics is found[0][2]
"""


def test_in_a_fresh_process() -> None:
    """The package and its errors need no torch; threads that look at once find the same."""
    done = subprocess.run([sys.executable, "-c", USES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pickled() -> None:
    import tangent_ops

    assert pickle.loads(pickle.dumps(tangent_ops.Recipe)) is tangent_ops.Recipe
    assert pickle.loads(pickle.dumps(tangent_ops.fit)) is tangent_ops.fit
