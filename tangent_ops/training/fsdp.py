"""FSDP for the anchor: each process of a group keeps a part of the frozen parameters.

`torch.distributed.fsdp.fully_shard` gathers a block's parameters during its forward pass. It finds
the backward pass by hooks on primals, which need no gradient here. The hooks of this module gather
the parameters for a backward pass through tangents; without them it would read freed memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Variable, forward_ad
from torch.autograd.graph import register_multi_grad_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._pytree import tree_leaves

from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.model.checkpointing import find_blocks
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.ops.levels import is_compiling
from tangent_ops.training.processes import Group


def fsdp_anchor(tangent: LinearizedModel, mesh: DeviceMesh | None = None) -> None:
    """Divide the frozen parameters of the anchor's blocks among the processes of a group.

    Use it for an anchor too large for one device. The parameters of a block (an element of
    ``model.blocks``, say; see `find_blocks`) are gathered while it runs, forward or backward, and
    divided at all other times. Each process keeps whole the deltas, the primal values of trained
    parameters, the buffers, and parameters outside of blocks or shared by several.

    Outputs, gradients, `fit`, `predict` and ``delta_dict`` do not change. All processes must then
    call the model together and equally often, as these functions do. Your own training loop must
    average the deltas' gradients itself: DistributedDataParallel does not take FSDP parameters.
    Move, cast and load the model first. Only weights are divided;
    ``tangent.set_grad_checkpointing()`` reduces the memory of activations.

    Args:
        tangent: the same in every process.
        mesh: the processes, as for `fully_shard`; None for all of them, on the model's device.

    Raises:
        ArgumentError: tangent is no tangent model or differs between processes, or there is no
            process group.
        UnsupportedError: the anchor is under FSDP already, has no blocks, or no block has a frozen
            parameter. Later calls of the model raise it for a derivative by the input, under
            torch.compile, and inside another transform of torch.func.
    """
    if not isinstance(tangent, LinearizedModel):
        raise ArgumentError(
            f"tangent must be a LinearizedModel, got a {type(tangent).__name__}: pass it through "
            "tangent_ops.linearize first"
        )
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ArgumentError(
            "there is no group of processes to divide the anchor among: start them with torchrun, "
            "and call torch.distributed.init_process_group() first"
        )
    anchor = tangent.anchor
    if tangent.uses_fsdp or any(isinstance(module, FSDPModule) for module in anchor.modules()):
        raise UnsupportedError("the anchor is under FSDP already")
    blocks = find_blocks(anchor)
    whole = {anchor.get_parameter(name) for name in tangent.deltas()} | _outside_of_one(
        blocks, anchor
    )
    if all(parameter in whole for block in blocks for parameter in block.parameters()):
        raise UnsupportedError(
            f"{tangent.model_name} has no frozen parameter in a block, so there is nothing to "
            "divide: train fewer parameters (`trainable`), such as last_blocks(model, k)"
        )
    device = next(anchor.parameters()).device
    Group(device).agree(tangent=(tangent.fingerprint, [*tangent.deltas()]))
    tangent.mark_fsdp()
    if mesh is None:
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        gathering = _Gathering(block)
        block.register_forward_pre_hook(gathering.before, with_kwargs=True)
        block.register_forward_hook(gathering.after)


def _outside_of_one(blocks: list[nn.Module], anchor: nn.Module) -> set[nn.Parameter]:
    """Parameters that do not belong to exactly one block."""
    uses = Counter(parameter for block in blocks for parameter in set(block.parameters()))
    inside = Counter(
        parameter
        for block in blocks
        for _, parameter in block.named_parameters(remove_duplicate=False)
    )
    everywhere = Counter(p for _, p in anchor.named_parameters(remove_duplicate=False))
    return {p for p in everywhere if uses[p] != 1 or inside[p] != everywhere[p]}


class _Gathering:
    """Gathers a block's parameters for its backward pass, and frees them after it."""

    def __init__(self, block: nn.Module) -> None:
        self.block: Any = block
        self.inputs: list[Tensor] = []
        self.calls: set[object] = set()  # whose backward pass is running

    def before(self, _block: nn.Module, args: Any, kwargs: Any) -> None:
        functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
        if is_compiling() or functorch.peek_interpreter_stack() is not None:
            raise UnsupportedError(
                "torch.compile, or a transform of torch.func, around an anchor under FSDP: its "
                "weights would be freed before they are read. Use a whole anchor"
            )
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
            raise UnsupportedError(
                "a derivative by the input of a block of an anchor under FSDP. Use a whole anchor"
            )
        self.inputs = list(_tracked(leaves))

    def after(self, _block: nn.Module, _args: Any, output: Any) -> None:
        call = object()
        for tangent in _tracked(tree_leaves(output)):
            tangent.register_hook(lambda _: self._enter(call))
        if self.inputs:
            register_multi_grad_hook(self.inputs, lambda _: self._leave(call))
        self.inputs = []

    def _enter(self, call: object) -> None:
        if call not in self.calls:
            self.calls.add(call)
            self.block.unshard()
            Variable._execution_engine.queue_callback(self._end)

    def _leave(self, call: object) -> None:
        self.calls.discard(call)
        if not self.calls:
            self.block.reshard()

    def _end(self) -> None:
        self.calls.clear()
        self.block.reshard()


def _tracked(leaves: list[Any]) -> Iterator[Tensor]:
    """Tangents that require gradients."""
    for leaf in leaves if forward_ad._current_level >= 0 else []:
        if isinstance(leaf, Tensor):
            tangent = forward_ad.unpack_dual(leaf).tangent
            if tangent is not None and tangent.requires_grad:
                yield tangent
