"""Sealed files: safetensors files whose headers' hashes are stored in the database.

The header holds ``content_sha256``, the hash of everything else, so the header's hash covers the
whole file. The header also holds a random salt: a hash that is kept after its file was erased
cannot confirm a guess of the content.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tangent_ops.composition.ledger.own_files import check_file, check_folder
from tangent_ops.errors import LedgerError, in_words
from tangent_ops.files import content_sha256, opened, to_json, write_new, write_safetensors


@dataclass(frozen=True)
class Seal:
    """A file's name in its folder, and the SHA-256 of its header's metadata as a line of JSON."""

    name: str
    sha256: str


def salt() -> str:
    """128 random bits."""
    return secrets.token_hex(16)


def seal(path: Path) -> Seal:
    """The seal of a file that was just written."""
    with _opened(path) as file:
        return Seal(path.name, _hash_of(file.metadata() or {}))


def header(folder: Path, sealed: Seal, version: str | None = None) -> dict[str, str]:
    """The metadata of a sealed file, without reading its tensors.

    Raises:
        LedgerError: the file is missing, its header is damaged or was edited, or `version` is given
            and the file's format is of another one.
    """
    path = folder / sealed.name
    with _opened(path) as file:
        metadata = _checked(file, folder, sealed)
    if version is not None and metadata["format_version"] != version:
        raise LedgerError(
            f"{path} has format version {metadata['format_version']}, this release reads "
            f"{version}: update tangent-ops"
        )
    return metadata


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new file that `seal` can seal; it is synced to disk when this returns."""
    metadata = {**metadata, "salt": salt()}
    metadata["content_sha256"] = content_sha256(tensors, metadata)
    write_new(path, lambda file: write_safetensors(file, tensors, metadata))


def read(folder: Path, sealed: Seal) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a sealed file, checked.

    Raises:
        LedgerError: the file is missing, damaged or was edited.
    """
    path = folder / sealed.name
    with _opened(path) as file:
        metadata = _checked(file, folder, sealed)
        # Cloned, because the tensors are mapped from the file and would change with it.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    rest = {key: value for key, value in metadata.items() if key != "content_sha256"}
    if content_sha256(tensors, rest) != metadata["content_sha256"]:
        raise LedgerError(f"{path} was changed after it was written")
    return tensors, metadata


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    check_folder(path.parent)
    check_file(path)
    try:
        with opened(path, own=True) as name, safe_open(name, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise LedgerError(f"{path} is missing") from error
    except (SafetensorError, OSError, RuntimeError) as error:
        raise LedgerError(f"{path} cannot be read: {in_words(error)}") from error


def _checked(file: safe_open, folder: Path, sealed: Seal) -> dict[str, str]:
    metadata = file.metadata() or {}
    if _hash_of(metadata) != sealed.sha256:
        raise LedgerError(f"{folder / sealed.name} was changed after it was written")
    return metadata


def _hash_of(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(to_json(dict(metadata)).encode("ascii")).hexdigest()
