"""Packages of npm and Debian: fetched by address, checked by sha256, kept; nothing is installed."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from assets import DemoError, sha256

AR_MAGIC = b"!<arch>\n"
AR_HEADER = 60  # bytes, in ASCII: the name in the first 16, the size from 48 to 58


@dataclass(frozen=True)
class Package:
    """A package's file in a registry.

    Attributes:
        name: What it is called there, with its version.
        path: Of the file, below the registry's address.
        sha256: Hash of the file, hex.
        registry: The registry's address.
        variable: The environment variable that names another one, a mirror, say.
    """

    name: str
    path: str
    sha256: str
    registry: str
    variable: str

    @property
    def address(self) -> str:
        base = os.environ.get(self.variable) or self.registry
        return f"{base.rstrip('/')}/{self.path}"


def npm(name: str, version: str, sha256: str) -> Package:
    """A package of the npm registry."""
    path = f"{name}/-/{name}-{version}.tgz"
    registry = "https://registry.npmjs.org"
    return Package(f"{name}@{version}", path, sha256, registry, "npm_config_registry")


def debian(name: str, path: str, sha256: str) -> Package:
    """A package of Debian's archive."""
    return Package(name, path, sha256, "https://deb.debian.org/debian", "TANGENT_OPS_DEBIAN_MIRROR")


def fetch_package(package: Package, cache: Path) -> Path:
    """Return the package's file, from the cache if it is there and whole.

    Raises:
        DemoError: It could not be had, or what came has another hash.
    """
    target = cache / package.sha256[:12] / Path(package.path).name
    if target.is_file() and sha256(target) == package.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {package.name} (once; kept in {target.parent})", flush=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        part = Path(folder) / "part"
        try:
            answer = urllib.request.urlopen(package.address, timeout=180)
            with answer, part.open("wb") as file:
                shutil.copyfileobj(answer, file)
        except (urllib.error.URLError, OSError) as error:
            raise DemoError(
                f"could not fetch {package.name} from {package.address}: {error}\n"
                f"Name a mirror in ${package.variable}, or put the file there yourself: {target}"
            ) from error
        found = sha256(part)
        if found != package.sha256:
            raise DemoError(
                f"{package.address} has sha256 {found}, expected {package.sha256}: it is not the "
                "file this study was written for, so nothing of it was kept"
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
