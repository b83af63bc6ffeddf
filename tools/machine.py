"""What a result was computed on."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import timm
import torch

ROOT = Path(__file__).resolve().parent.parent


def about() -> dict[str, str]:
    """Machine, versions, commit and date."""
    return {
        "cpu": cpu(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
    }


def cpu() -> str:
    """Name and number of cores."""
    return f"{cpuinfo('model name') or platform.machine()}, {os.cpu_count()} cores"


def cpuinfo(key: str) -> str:
    """The first core's value in /proc/cpuinfo; "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def commit() -> str:
    """The checkout's commit, "+changes" where files differ from it; "unknown" outside git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + ("+changes" if _git("status", "--porcelain", "-uno") else "") or "unknown"


def _git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        return ""
