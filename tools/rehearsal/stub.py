"""Builds and loads the stand-in for libcuda (libcuda.c), and reads the launches it recorded."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import knobs

from tools.kernels.resources import SHARED_LIMITS

SOURCE = Path(__file__).with_name("libcuda.c")
INCLUDE = Path(triton.__file__).parent / "backends/nvidia/include"


@dataclass(frozen=True)
class Launched:
    """One launch that the stand-in has recorded."""

    kernel: str  # its name
    specialization: int  # number of the compiled kernel, in the order of loading
    grid: tuple[int, int, int]
    threads: int  # of a block
    shared: int  # bytes of shared memory of a block


class _Record(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
    )


def compiler() -> str | None:
    """The C compiler, as Triton looks for it; None if there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def load(arch: int) -> None:
    """Load the stand-in in front of any libcuda, as a GPU of this compute capability.

    Raises:
        RuntimeError: there is a CUDA device, or no C compiler.
    """
    if torch._C._cuda_getDeviceCount() > 0:
        raise RuntimeError("the rehearsal is for machines without a GPU; set CUDA_VISIBLE_DEVICES=")
    _library().stub_begin(arch, SHARED_LIMITS[arch])


def launches() -> list[Launched]:
    """The launches since the start, or since :func:`forget_launches`."""
    library = _library()
    records = library.stub_launches()
    return [
        Launched(
            library.stub_function_name(record.function).decode(),
            record.function,
            tuple(record.grid),
            record.threads,
            record.shared,
        )
        for record in (records[i] for i in range(library.stub_launch_count()))
    ]


def launch_count() -> int:
    """The number of these launches."""
    return _library().stub_launch_count()


def forget_launches() -> None:
    """Start the record of launches anew; compiled kernels stay loaded."""
    _library().stub_forget_launches()


def loaded_kernels() -> list[str]:
    """The names of all compiled kernels loaded so far, one for each specialisation."""
    library = _library()
    count = library.stub_function_count()
    return [library.stub_function_name(i + 1).decode() for i in range(count)]


@functools.cache
def _library() -> ctypes.CDLL:
    path = _build()
    os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)  # to link against
    # Global, under libcuda's own name: whoever asks the linker for libcuda.so.1 finds this one.
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.stub_launch_count.restype = ctypes.c_long
    library.stub_launches.restype = ctypes.POINTER(_Record)
    library.stub_function_name.restype = ctypes.c_char_p
    return library


def _build() -> Path:
    """The compiled stand-in, in Triton's cache folder."""
    key = hashlib.sha256(SOURCE.read_bytes() + str(INCLUDE).encode()).hexdigest()[:16]
    target = Path(knobs.cache.dir, f"rehearsal-{key}", "libcuda.so.1")
    if target.exists():
        return target
    cc = compiler()
    if cc is None:
        raise RuntimeError("the rehearsal needs a C compiler: install gcc or clang, or set CC")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    options = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{INCLUDE}"]
    subprocess.run([cc, *options, str(SOURCE), "-o", str(partial)], check=True)
    partial.replace(target)  # whole or not at all, also with several processes
    return target
