"""Writes and reads files of tensors: hashed, atomic, and the same bytes for the same content.

Opening never blocks, even if the path is a pipe. Files in a folder of this library (`own`) are
opened and erased without following links.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from tangent_ops.errors import ArgumentError, DiskFullError

_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
_DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def content_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Hash names, dtypes, shapes, bytes and metadata, in hexadecimal.

    `tangent_ops.delta` says what is hashed, byte for byte. The order of the entries, the device
    and the strides do not matter.
    """
    names = sorted(tensors)
    head = {
        "metadata": dict(metadata),
        "tensors": [
            [name, dtype_name(tensors[name].dtype), list(tensors[name].shape)] for name in names
        ],
    }
    digest = hashlib.sha256(to_json(head).encode("ascii") + b"\n")
    for name in names:
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the format of https://huggingface.co/docs/safetensors, byte for byte repeatable.

    safetensors' own writer does not keep the order of the metadata.

    Args:
        file: open for writing.
        tensors: name -> float64, float32, float16, bfloat16 or int64 tensor, on any device.
        metadata: strings for the header.
    """
    # Wide elements first, so that every tensor is aligned, as the format requires.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = to_json(header).encode("ascii")
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in names:
        file.write(bytes_of(tensors[name]))


def check_target(path: Path, argument: str = "path") -> None:
    """Raise ArgumentError, naming the argument, if it is a folder or its folder does not exist."""
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise ArgumentError(f"cannot write {argument}={path}: it {reason}")


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file beside `path`, sync it to disk and rename it to `path`.

    If `write` or the file system raises, the error passes on, `path` keeps its older content, and
    the temporary file is removed. A killed process may leave its temporary file, which the next
    call in this folder removes.

    Raises:
        DiskFullError: the disk is full, with the number of bytes that the file needs.
        OSError: the file cannot be written.
    """
    sweep(path.parent)
    with telling_of_full_disk(path, write), temporary_file(path.parent) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)
    sync_folder(path.parent)


def copy_atomically(source: Path, path: Path) -> None:
    """Copy a file, as `write_atomically` writes one."""

    def write(target: BinaryIO) -> None:
        with open(source, "rb") as file:
            shutil.copyfileobj(file, target)

    write_atomically(path, write)


def write_new(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a new file and sync it to disk; an error or a crash may leave a part of it.

    For files that nothing refers to yet.

    Raises:
        DiskFullError, OSError: as in `write_atomically`.
    """
    with telling_of_full_disk(path, write), open(path, "xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


@contextmanager
def temporary_file(folder: Path) -> Iterator[BinaryIO]:
    """A new file in a folder, ``.<16 hex digits>.tmp``, which is removed at the end if it is there.

    It is locked as long as it is open, so `sweep` of another process leaves it alone.
    """
    while True:
        path = folder / f".{secrets.token_hex(8)}.tmp"
        file = open(path, "xb")  # noqa: SIM115 (it is closed below)
        with suppress(OSError):  # a file system without locks, on which nothing is swept
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # swept before it was locked
    try:
        yield file
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
        with suppress(OSError):  # what a full disk did not take is lost with the file
            file.close()


def sweep(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder: those that nobody has locked.

    Files of other users, and what cannot be locked or removed, are left.
    """
    try:
        names = [name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]
    except OSError:
        return
    for name in names:
        with suppress(OSError):
            descriptor = _open(folder / name, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(folder / name)
            finally:
                os.close(descriptor)


@contextmanager
def telling_of_full_disk(
    path: Path, write: Callable[[BinaryIO], None] | None = None
) -> Iterator[None]:
    """Raise DiskFullError in place of the system's error.

    Args:
        path: what is written.
        write: called again, on a file that only counts, to say how many bytes are needed.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = None if write is None else _counted(write)
        words = "has no room" if needed is None else f"needs {needed:,} bytes"
        with suppress(OSError):
            words += f", and {shutil.disk_usage(path.parent).free:,} bytes are free"
        raise DiskFullError(
            f"the disk is full: {path} {words}. It was not written: make room, and give the same "
            "command again"
        ) from error


def _counted(write: Callable[[BinaryIO], None]) -> int | None:
    counter = _Counter()
    try:
        write(counter)  # pyright: ignore[reportArgumentType]
    except Exception:  # a writer that needs a real file
        return None
    return counter.count or None


class _Counter(io.RawIOBase):
    """Counts the bytes that are written to it."""

    count = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        size = memoryview(data).nbytes
        self.count += size
        return size


@contextmanager
def opened(path: str | os.PathLike[str], *, own: bool = False) -> Iterator[str]:
    """Open a regular file for reading, and yield a path of the open file for libraries.

    That path leads to this file even if `path` is replaced in the meantime.

    Args:
        path: the file.
        own: the file is in a folder of this library: a link in its or its folder's place is an
            error.

    Raises:
        OSError: the file does not exist or is not a regular file.
    """
    if own:
        path = Path(path)
        with _held(path.parent) as folder:
            descriptor = _open(path.name, os.O_RDONLY | os.O_NOFOLLOW, folder)
    else:
        descriptor = _open(path, os.O_RDONLY)
    try:
        yield f"/dev/fd/{descriptor}"
    finally:
        os.close(descriptor)


def erase(path: Path) -> None:
    """Overwrite a file of this library with zeros and remove it; do nothing if it does not exist.

    Raises:
        OSError: the file is not regular, or a link is in its or its folder's place.
    """
    with suppress(FileNotFoundError), _held(path.parent) as folder:
        with open(_open(path.name, os.O_WRONLY | os.O_NOFOLLOW, folder), "wb") as file:
            left = os.fstat(file.fileno()).st_size
            while left:
                left -= file.write(bytes(min(left, 1 << 20)))
            file.flush()
            os.fsync(file.fileno())
        os.unlink(path.name, dir_fd=folder)
        os.fsync(folder)


@contextmanager
def _held(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open(path: str | os.PathLike[str], flags: int, folder: int | None = None) -> int:
    # O_NONBLOCK: opening a pipe would wait for a writer.
    descriptor = os.open(path, flags | os.O_NONBLOCK, dir_fd=folder)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    why = os.strerror(code) if stat.S_ISDIR(mode) else "Not a regular file"
    raise OSError(code, why, os.fspath(path))  # IsADirectoryError, by its code


def sync_folder(path: Path) -> None:
    """Sync a folder's entries to disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def add_tensor(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Add dtype, shape and bytes of a tensor to a hash."""
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(bytes_of(tensor))


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's bytes, C order, little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)  # 0-d tensors have no uint8 view
    return flat.view(torch.uint8).numpy().data


def to_json(value: object) -> str:
    """One line of ASCII, the same for the same content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
