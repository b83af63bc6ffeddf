"""Triton's CUDA driver with its own launcher in C, on the stand-in for libcuda."""

from __future__ import annotations

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver


class StandInDriver(CudaDriver):
    """Compiles, loads and launches as on the GPU of the stand-in, with tensors on the CPU."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)  # no L2 cache to clear


def activate() -> None:
    """Make it this process's driver, which Triton cannot take back."""
    triton.runtime.driver.set_active(StandInDriver())
