"""What a number was measured on, and the file it is kept in."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Machine, versions, date and commit, for people to read."""
    found = {
        "cpu": f"{_cpu()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "fp32 products": torch.get_float32_matmul_precision(),
        "threads": str(torch.get_num_threads()),
        "malloc": " ".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith("MALLOC_"))
        or "defaults",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        found["clocks"] = _gpu_clocks()
    else:
        found["clocks"] = _cpu_value("cpu MHz") + " MHz"
    return found


def commit() -> str:
    """The checkout's commit, "+changes" where files differ from it; "unknown" outside git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes `content` to `path`, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def _cpu() -> str:
    return _cpu_value("model name") or platform.processor() or platform.machine()


def _cpu_value(key: str) -> str:
    """Of the first core, as the kernel tells; "" where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _gpu_clocks() -> str:
    """As nvidia-smi tells, at this moment; "unknown" where there is none."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,persistence_mode"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{fields}: {done.stdout.splitlines()[0]}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
