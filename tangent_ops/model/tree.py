"""Tensors under dotted names, as nested modules: a state_dict key is the name itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Tree(nn.Module):
    """Parameters and buffers by name, never in 16 bits.

    Args:
        tensors: name -> parameter, or another tensor, which becomes a buffer.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]  # pyright: ignore[reportAssignmentType]
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(leaf, tensor)
            else:
                module.register_buffer(leaf, tensor)

    def tensors(self) -> dict[str, Any]:
        """The live tensors by name, or what functional_call has put in their place."""
        return {name: lookup(self, name) for name in self.names}

    def _apply(self, fn: Callable[[Tensor], Tensor], *args, **kwargs):  # .to(), .half(), ...
        def at_least_single(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(moved.device, torch.float32)
            return moved

        return super()._apply(at_least_single, *args, **kwargs)


def lookup(module: nn.Module, name: str) -> Any:
    """The parameter of that dotted name, or what functional_call has put in its place."""
    return functools.reduce(getattr, name.split("."), module)
