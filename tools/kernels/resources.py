"""Compiles a kernel's launch for a GPU, without one, and counts the resources that it takes."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from tangent_kernels._launch import Launch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from tools.kernels.sass import Instruction, main_loop, parse

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
KIB = 1024
# Shared memory that one block may have, in bytes.
SHARED_LIMITS = {80: 163 * KIB, 86: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB}
TENSOR_LIMIT = 512  # columns of tensor memory that a multiprocessor of sm_100 has


@dataclass(frozen=True)
class Resources:
    """Resources and matrix instructions of one compiled kernel."""

    registers: int  # per thread
    spilled: int  # bytes of stack per thread
    shared: int  # bytes per block
    tensor: int  # columns of sm_100's tensor memory per block; beyond 512 ptxas emits only a trap
    warps: int
    hmma: int  # mma.sync, of every architecture
    hgmma: int  # wgmma, of sm_90
    utcmma: int  # tcgen05.mma, of sm_100
    serialized: str = ""  # ptxas's reason to wait for each wgmma before the next; "" if it does not
    loop: tuple[Instruction, ...] = ()  # one iteration of the main loop, see sass.main_loop
    config: Any = None  # the launch's

    def blocks(self, arch: int) -> int:
        """Blocks that fit on one multiprocessor, by registers and shared memory."""
        by_registers = 65536 // (32 * self.warps * max(8 * -(-self.registers // 8), 1))
        by_shared = (SHARED_LIMITS[arch] + KIB) // (self.shared + KIB)
        by_tensor = TENSOR_LIMIT // triton.next_power_of_2(max(self.tensor, TENSOR_LIMIT // 32))
        return min(by_registers, by_shared, by_tensor)

    def excess(self, arch: int) -> str:
        """The resource that a multiprocessor has too little of, in words; "" if there is none."""
        if self.shared > SHARED_LIMITS[arch]:
            return f"{self.shared} bytes of shared memory of {SHARED_LIMITS[arch]}"
        if self.tensor > TENSOR_LIMIT:
            return f"{self.tensor} columns of tensor memory of {TENSOR_LIMIT}"
        return ""

    @property
    def matrix(self) -> int:
        """Matrix instructions of all kinds."""
        return self.hmma + self.hgmma + self.utcmma


def specialize(launch: Launch, arch: int) -> tuple[ASTSource, dict[str, Any]]:
    """The source that Triton compiles for this launch on ``arch``, and its options.

    The arguments are specialised as the launch itself does: otherwise loads are not pipelined, and
    registers and shared memory come out wrong.
    """
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = launch.keywords() | {"debug": False, "instrumentation_mode": ""}
    bound, specialization, options = bind(**keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def compile_launch(launch: Launch, arch: int) -> Any:
    """The compiled kernel of a launch, as :func:`triton.compile` returns it."""
    source, options = specialize(launch, arch)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(launch: Launch, arch: int) -> Resources:
    """Compile a launch for ``arch`` and count what it takes."""
    compiled = compile_launch(launch, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    hgmma = len(re.findall(r"\bHGMMA\.", sass))
    return Resources(
        registers=int(found[1]),
        spilled=int(found[2]),
        shared=compiled.metadata.shared,
        tensor=getattr(compiled.metadata, "tmem_size", 0) or 0,
        warps=launch.config.num_warps,
        hmma=len(re.findall(r"\bHMMA\.", sass)),
        hgmma=hgmma,
        utcmma=len(re.findall(r"\bUTC\w*MMA", sass)),
        serialized=serialization(compiled) if hgmma else "",
        loop=tuple(main_loop(parse(sass))),
        config=launch.config,
    )


def serialization(compiled: Any) -> str:
    """The warning (C75..) with which ptxas serializes a kernel's wgmma instructions; "" if none.

    ptxas runs again: Triton discards what it prints, and does not run it for a kernel in its cache.
    """
    target = compiled.metadata.target
    backend: Any = make_backend(target)
    options = backend.parse_options(compiled.metadata._asdict())
    printed = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(printed):
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(compiled.asm["ptx"], {}, options, target.arch)
    found = re.search(r"\(C75\d\d\)[^\n]*", printed.getvalue())
    return found[0] if found else ""


def _cuobjdump(flag: str, cubin: Path) -> str:
    return subprocess.run(
        [CUOBJDUMP, flag, cubin], check=True, capture_output=True, text=True
    ).stdout
