"""Which operation of a model lacks a derivative: found without computing, said by name."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import warnings
from collections.abc import Collection, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tangent_ops._threads import in_own_level, in_turn
from tangent_ops.errors import UnsupportedError
from tangent_ops.forward_ad import fused_calls
from tangent_ops.functional._backend import in_forward_ad

# PyTorch's own words.
_NO_FORWARD = re.compile(r"Trying to use forward AD with (\S+) that does not support it")
_NO_JVP = re.compile(r"must implement the jvp function for custom autograd\.Function")
_NO_BACKWARD = re.compile(r"derivative for (\S+) is not implemented")
# In the forward pass of a check: a ViT-L has 16 thousand, some 70 µs each. Not a time: whether a
# model is refused must not depend on how busy the machine is.
OPERATIONS = 40_000


def check_derivatives(anchor: nn.Module, names: Collection[str], example: Any = None) -> None:
    """Raise what a linearized forward or backward pass would, from tensors without contents.

    Anything else that goes wrong here, and a forward pass beyond ``OPERATIONS`` (recurrent layers,
    step by step), is no answer and ends in silence: the first call shows what is real.

    Args:
        anchor: in eval mode; a copy of it runs, whose tensors hold nothing.
        names: of the parameters to train.
        example: the model's input, or a tuple of its inputs, of which shapes and dtypes count.
            None: an image as timm's ``pretrained_cfg`` has it, or no check where there is none.

    Raises:
        UnsupportedError: an operation has no derivative; it names operation and module.
    """
    if example is None:
        example = _described(anchor)
    if example is None or in_forward_ad():  # a level inside another would be refused
        return
    inputs = example if isinstance(example, tuple) else (example,)

    def run() -> None:
        with _quietly(), naming_what_lacks(anchor):
            _dry_run(anchor, names, inputs)

    try:
        in_turn(run)  # the filters of warnings, too, are the whole process's
    except UnsupportedError:
        raise
    except Exception:
        return


@contextlib.contextmanager
def naming_what_lacks(anchor: nn.Module) -> Iterator[None]:
    """Turns PyTorch's error for a missing derivative into one that says where and what to do."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        lacking = _lacking(error)
        if lacking is None:
            raise
        raise UnsupportedError(
            f"{lacking}{_caller(error, anchor)}. Train parameters above it alone (`trainable`), "
            "or replace it by operations that have one."
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without warnings, and without what PyTorch logs of shapes that do not fit."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def _described(anchor: nn.Module) -> Tensor | None:
    config = getattr(anchor, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    weight = next((p for p in anchor.parameters() if p.is_floating_point()), None)
    if size is None or weight is None:
        return None
    return torch.empty(1, *size, dtype=weight.dtype, device="meta")


def _dry_run(anchor: nn.Module, names: Collection[str], inputs: tuple) -> None:
    """Forward and backward of a copy whose tensors have shapes alone."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as hollow,
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        trained, deltas = in_own_level(lambda: _hollow_tangents(hollow, anchor, names, inputs))
        # As after a real forward pass, the level is left: nothing is dual on the way back.
        cotangents = [torch.empty_like(t) for t in trained]
        torch.autograd.grad(trained, deltas, cotangents, allow_unused=True)


def _hollow_tangents(
    hollow: FakeTensorMode, anchor: nn.Module, names: Collection[str], inputs: tuple
) -> tuple[list[Tensor], list[Tensor]]:
    """Tangents of the outputs, and the deltas that they depend on."""
    device = next(anchor.parameters()).device
    with fused_calls():
        deltas, memo = [], {}
        for name, tensor in [*anchor.named_parameters(), *anchor.named_buffers()]:
            empty = hollow.from_tensor(tensor.detach())
            if name in names:
                deltas.append(torch.empty_like(empty).requires_grad_())
                empty = forward_ad.make_dual(empty, deltas[-1])
            memo[id(tensor)] = empty
        model = copy.deepcopy(anchor, memo)
        arguments = tree_map(
            lambda x: torch.empty_like(x, device=device) if isinstance(x, Tensor) else x, inputs
        )
        with _Limited(OPERATIONS):
            outputs = [x for x in tree_leaves(model(*arguments)) if isinstance(x, Tensor)]
        tangents = [forward_ad.unpack_dual(x).tangent for x in outputs]
        return [t for t in tangents if t is not None and t.requires_grad], deltas


class _Limited(TorchDispatchMode):
    """Raises TimeoutError after so many operations."""

    def __init__(self, operations: int) -> None:
        super().__init__()
        self.left = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise TimeoutError
        return func(*args, **(kwargs or {}))


def _lacking(error: Exception) -> str | None:
    """What is missing, in words; None where the error is about something else."""
    words = str(error)
    if found := _NO_FORWARD.search(words):
        return f"{found[1]} has no forward-mode derivative in PyTorch"
    if found := _NO_BACKWARD.search(words):
        return f"{found[1]}, on the way back from a tangent, has no derivative in PyTorch"
    if _NO_JVP.search(words):
        owner = _frames(error)[-2].f_locals.get("self")
        name = getattr(getattr(owner, "_forward_cls", None), "__name__", "a Function")
        return f"{name}, a torch.autograd.Function, has no jvp() and so no forward-mode derivative"
    return None


def _caller(error: Exception, anchor: nn.Module) -> str:
    """The innermost module that was running, with its name if the anchor has it."""
    running = [frame.f_locals.get("self") for frame in _frames(error)]
    modules = [module for module in running if isinstance(module, nn.Module)]
    if not modules:
        return ""
    kind = type(modules[-1]).__name__
    names = {id(module): name for name, module in anchor.named_modules()}
    for root in modules:  # the anchor, or its copy
        names |= {id(module): name for name, module in root.named_modules()}
        if type(root) is type(anchor):
            break
    name = names.get(id(modules[-1]))
    return f"; {kind} calls it" + (f", as {name}" if name else "")


def _frames(error: Exception) -> list[FrameType]:
    found, here = [], error.__traceback__
    while here is not None:
        found.append(here.tb_frame)
        here = here.tb_next
    return found
