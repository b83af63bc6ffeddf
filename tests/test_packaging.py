"""The package imported, built and installed elsewhere, and the targets of make."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import tangent_ops

ROOT = Path(__file__).resolve().parent.parent
SOURCES = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])

# Dual attention against PyTorch's own formula for it, and where the packages came from.
TINY_CALL = """
import torch, tangent_kernels, tangent_ops
from torch.nn.attention import SDPBackend, sdpa_kernel

qkv, qkv_t = torch.randn(2, 3, 1, 2, 5, 8, dtype=torch.float64).unbind()
found = torch.func.jvp(tangent_ops.scaled_dot_product_attention, tuple(qkv), tuple(qkv_t))
with sdpa_kernel(SDPBackend.MATH):
    plain = torch.nn.functional.scaled_dot_product_attention
    expected = torch.func.jvp(plain, tuple(qkv), tuple(qkv_t))
torch.testing.assert_close(found, expected)
print(tangent_ops.__file__)
print(tangent_kernels.__file__)
"""


def run(*command: str | Path, cwd: Path, path: str = "") -> str:
    """The command's output; its error, shown, where it fails."""
    # Under `make test` the outer make would pass its own settings on to a make started here.
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    environment["PYTHONPATH"] = path
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command[:4]} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_import_is_light(tmp_path: Path) -> None:
    """In a fresh process: this one may have imported anything by now."""
    code = "import sys, tangent_ops; print(*sorted({'triton', 'timm'} & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=tmp_path, path=SOURCES).split() == []


def test_public_names_exist(tmp_path: Path) -> None:
    code = "import tangent_ops as t; print(*[n for n in t.__all__ if not hasattr(t, n)])"
    assert run(sys.executable, "-c", code, cwd=tmp_path, path=SOURCES).split() == []


def test_works_uninstalled(tmp_path: Path) -> None:
    origins = run(sys.executable, "-c", TINY_CALL, cwd=tmp_path, path=SOURCES).splitlines()
    assert [Path(origin) for origin in origins] == [
        ROOT / "tangent_ops" / "__init__.py",
        ROOT / "kernels" / "tangent_kernels" / "__init__.py",
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout, where no earlier build can leak into it."""
    pytest.importorskip("build", reason="the wheel is built with `build`, of the test extra")
    folder = tmp_path_factory.mktemp("wheel")
    local = shutil.ignore_patterns(
        ".*", "*.egg-info", "__pycache__", "build", "dist", "out", "downloads"
    )
    shutil.copytree(ROOT, folder / "source", ignore=local)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder]
    run(*command, folder / "source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = {name for name in names if ".dist-info/" not in name}
    expected = {
        path.relative_to(root).as_posix()
        for root, package in ((ROOT, "tangent_ops"), (ROOT / "kernels", "tangent_kernels"))
        for pattern in ("*.py", "*.json", "*.j2", "py.typed")
        for path in (root / package).rglob(pattern)
    }
    assert files == expected
    assert "tangent_ops/profiling/report.html.j2" in files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site]
    run(*install, wheel, cwd=elsewhere)
    origins = run(sys.executable, "-c", TINY_CALL, cwd=elsewhere, path=str(site)).splitlines()
    assert [Path(origin) for origin in origins] == [
        site / "tangent_ops" / "__init__.py",
        site / "tangent_kernels" / "__init__.py",
    ]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_its_targets() -> None:
    listed = re.findall(r"^  make ([a-z-]+) +\S", run("make", cwd=ROOT), flags=re.MULTILINE)
    assert {
        "demo",
        "test",
        "lint",
        "bench",
        "compile-check",
        "gpu-check",
        "format",
        "clean",
    } <= set(listed)
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony is not None
    assert set(listed) == set(phony[1].split()), "a target without help, or help without a target"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    "target", ["demo", "test", "lint", "docs", "bench", "compile-check", "rehearse", "gpu-check"]
)
def test_make_creates_the_environment_it_uses(target: str, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    plan = run("make", "--dry-run", target, f"VENV={environment}", cwd=ROOT)
    steps = [f"-m venv {environment}", f"{environment}/bin/python -m pip install"]
    places = [plan.find(step) for step in steps]
    assert -1 not in places and places == sorted(places), plan


def test_no_public_name_hides_a_module() -> None:
    """`tangent_ops.fit` is a function, so no module may be called `tangent_ops/fit.py`."""
    modules = list(pkgutil.walk_packages(tangent_ops.__path__, "tangent_ops."))
    assert len(modules) > 100
    for module in modules:
        package, _, name = module.name.rpartition(".")
        found = vars(importlib.import_module(package)).get(name)
        assert found is None or isinstance(found, ModuleType), module.name
