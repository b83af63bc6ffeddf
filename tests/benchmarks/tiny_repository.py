"""A repository whose library takes the time it is told, and a suite of benchmarks for it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
OWN = (
    "__init__.py",
    "compare_worker.py",
    "processes.py",
    "record.py",
    "timing.py",
)  # the real ones

LIBRARY = """
import os, sys, time

print("a library that prints", flush=True)
os.write(1, b"{}\\n")  # below Python's own stdout, too

def steady(): time.sleep(0.004); return 1.0
def slowed(): time.sleep(0.004); return 1.0
def hastened(): time.sleep(0.012); return 1.0
def mistaken(): return 1.0
def broken(): return 1.0
def endless(): return 1.0
"""
CHANGED = (
    LIBRARY.replace("slowed(): time.sleep(0.004)", "slowed(): time.sleep(0.012)")
    .replace("hastened(): time.sleep(0.012)", "hastened(): time.sleep(0.004)")
    .replace("mistaken(): return 1.0", "mistaken(): return float('nan')")
    .replace("broken(): return 1.0", "broken(): raise ValueError('no more')")
    .replace("endless(): return 1.0", "endless(): time.sleep(600)")
) + "def fresh(): return 1.0\n"
CRASHING = LIBRARY.replace("steady(): ", "steady(): sys.stderr.write('out of luck'); os._exit(7); ")

# Importing the real one takes seconds, and the workers need this much of it.
TORCH = """
__version__ = "a stand-in"
class device:
    def __init__(self, name): self.type = getattr(name, "type", name)
def get_num_threads(): return 1
def get_float32_matmul_precision(): return "highest"
"""
TEST = """
from pathlib import Path
import tangent_ops

def test_own_sources():
    assert Path(tangent_ops.__file__).is_relative_to(Path.cwd())

def test_fact():
    assert 1 + 1 == 2
"""

REGISTRY = """
from dataclasses import dataclass
import tangent_ops
from tangent_ops import slowed

@dataclass(frozen=True)
class Case:
    op: str
    group: str = "tiny"
    def __str__(self): return f"{self.op} 1x1"

class Provider:
    slack = 1.0
    def __init__(self, name): self.name = name
    def prepare(self, case, inputs): return lambda: (getattr(tangent_ops, case.op)(),)
    def why_not(self, case, device): return "needs a moon" if case.op == "lunar" else None

class Workload:
    def providers(self, case): return [Provider("ours"), Provider("rival")]
    def inputs(self, case, device, seed): return None
    def expected(self, case, inputs): return (1.0,)
    def compared(self, case, outputs): return outputs
    def bound(self, case): return 0.5

OPS = "steady slowed hastened mistaken broken endless fresh lunar".split()
def workload_of(case): return Workload()
def all_cases(device, extent): return [Case(op) for op in OPS]
def provider_of(case, name): return Provider(name)
"""
MEASURE = """
def relative_error(found, exact): return max(abs(f - e) for f, e in zip(found, exact))
"""


def make_repository(folder: Path) -> Path:
    """Tags: before, base, twin, changed, crashing, red, headless. HEAD is `twin`."""
    files = {
        "torch.py": TORCH,
        "pytest.ini": "[pytest]\n",
        "tests/test_tiny.py": TEST,
        "kernels/tangent_kernels/__init__.py": "",
        # What a commit brings of benchmarks is not used.
        "benchmarks/__init__.py": "raise RuntimeError('the benchmarks of a commit')",
    }
    git(folder.parent, "init", "--quiet", str(folder))
    _commit(folder, "before", {**files, "tangent_ops/__init__.py": "def steady(): return 1.0\n"})
    _commit(folder, "base", {"tangent_ops/__init__.py": LIBRARY})
    _commit(folder, "twin", {"tangent_ops/__init__.py": LIBRARY + "# a comment\n"})
    for tag, file, content in (
        ("changed", "tangent_ops/__init__.py", CHANGED),
        ("crashing", "tangent_ops/__init__.py", CRASHING),
        ("red", "tests/test_tiny.py", TEST.replace("1 + 1 == 2", "1 + 1 == 3")),
        ("headless", "kernels/tangent_kernels/__init__.py", None),
    ):
        git(folder, "checkout", "--quiet", "--detach", "twin")
        _commit(folder, tag, {file: content})
    git(folder, "checkout", "--quiet", "--detach", "twin")
    return folder


def make_benchmarks(folder: Path) -> Path:
    """A `benchmarks` package: the real protocol and timing, a tiny suite."""
    for name in OWN:
        _write(folder / name, (ROOT / "benchmarks" / name).read_text(encoding="utf-8"))
    _write(folder / "suite" / "__init__.py", "")
    _write(folder / "suite" / "registry.py", REGISTRY)
    _write(folder / "suite" / "measure.py", MEASURE)
    return folder


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=Tiny", "-c", "user.email=tiny@example.org"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _commit(folder: Path, tag: str, files: dict[str, str | None]) -> None:
    for name, content in files.items():
        if content is None:
            shutil.rmtree((folder / name).parent)
        else:
            _write(folder / name, content)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", tag)
    git(folder, "tag", tag)


def _write(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
