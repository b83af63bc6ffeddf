"""The machine, versions and settings with which a profile was made."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from tangent_ops.model.allocator import keep_memory

_PACKAGES = ("tangent-ops", "triton", "timm")


def environment(device: torch.device | str) -> dict[str, str]:
    """Machine, versions, settings that change timings, and the date, for people to read."""
    device = torch.device(device)
    found = {"device": f"{_processor()}, {os.cpu_count()} cores"}
    if device.type == "cuda":
        found = {
            "device": torch.cuda.get_device_name(device),
            "cuda": str(torch.version.cuda),
            "host": found["device"],
        }
    return {
        **found,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the build, unlike the package's version
        **{name: _version(name) for name in _PACKAGES},
        "float32 products": torch.get_float32_matmul_precision(),
        "malloc": malloc(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def malloc() -> str:
    """How malloc treats freed memory: as the environment or `keep_memory` says, or by default."""
    names = ("MALLOC_", "GLIBC_TUNABLES")
    own = " ".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith(names))
    return own or ("keeps freed memory" if keep_memory() else "defaults")


def _version(name: str) -> str:
    """A package's version, or that it is not installed, as tangent-ops run from its sources."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
