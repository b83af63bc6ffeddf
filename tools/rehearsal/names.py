"""A mode in which "cuda" names the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CudaNames(TorchFunctionMode):
    """Takes "cuda" for "cpu" in every call of a PyTorch function."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.device:  # programs ask what its type is
            return func(*args, **(kwargs or {}))
        options = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **options)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, str):
        return "cpu" if value.split(":")[0] == "cuda" else value
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return value


class Generator(torch.Generator):
    """A generator for "cuda" draws on the CPU."""

    def __new__(cls, device: Any = "cpu"):
        return super().__new__(cls, _on_cpu(device))  # pyright: ignore[reportCallIssue]
