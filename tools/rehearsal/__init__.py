"""The rehearsal of a GPU: kernels are compiled and launched the real way, and nothing runs.

In a process of its own, without TRITON_INTERPRET, before any kernel is launched:

    from tools import rehearsal

    rehearsal.start()
    F.gelu(dual_on_the_cpu)      # Triton's binder, compiler and C launcher; the result is garbage
    rehearsal.launches()         # kernel, grid, threads and shared memory of each launch

It proves nothing about numbers or time on a device: see kernels/README.md, "Without a GPU".
"""

from __future__ import annotations

from tools.rehearsal.names import CudaNames
from tools.rehearsal.stub import (
    Launched,
    compiler,
    forget_launches,
    launch_count,
    launches,
    load,
    loaded_kernels,
)

__all__ = [
    "CudaNames",
    "Launched",
    "compiler",
    "forget_launches",
    "launch_count",
    "launches",
    "loaded_kernels",
    "start",
]


def start(arch: int = 90, compiled: bool = True) -> None:
    """Let CPU tensors stand for tensors on a GPU of this compute capability, in this process.

    ``Tensor.is_cuda`` is True from here on, so ops choose the kernels by themselves. Where programs
    name the device "cuda", run them within :class:`CudaNames`.

    Args:
        arch: 80, 86, 90 or 100.
        compiled: False to tell kernels apart without compiling them.

    Raises:
        RuntimeError: there is a CUDA device, or no C compiler.
    """
    from tangent_ops.ops import backend
    from tools.rehearsal.count import count_only
    from tools.rehearsal.device import fake_cuda
    from tools.rehearsal.driver import activate

    load(arch)
    fake_cuda(arch)  # before the driver, which takes its functions from torch.cuda
    activate()
    backend.cpu_stands_for_cuda = True  # compiled code asks no Python property
    if not compiled:
        count_only()
