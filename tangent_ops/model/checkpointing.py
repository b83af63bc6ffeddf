"""Activation checkpointing: a block saves only its inputs and runs again in the backward pass.

``torch.utils.checkpoint`` repeats a block after the forward-mode level has ended, without tangents.
Tangents are not needed here: the anchor is frozen, and the transpose of J is the block's ordinary
backward pass. So a block repeats its ordinary forward pass (1F; the dual one takes 3F) and saves
what checkpointed fine-tuning saves: the primal of its input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tangent_ops.errors import UnsupportedError
from tangent_ops.model.eval_caches import Kept
from tangent_ops.ops.factored import Factors
from tangent_ops.ops.factored_calls import factored_calls
from tangent_ops.ops.levels import alone

_FLAGS = ("grad_checkpointing", "gradient_checkpointing")  # timm's, Hugging Face's
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WAY_OUT = "Use set_grad_checkpointing(False)."


def find_switches(model: nn.Module) -> list[nn.Module]:
    """Modules that have timm's or Hugging Face's flag for checkpointing."""
    return [m for m in model.modules() if any(flag in vars(m) for flag in _FLAGS)]


def take_flags(switches: Iterable[nn.Module]) -> bool:
    """Whether any checkpointing flag is on; all flags are switched off."""
    on = [(m, flag) for m in switches for flag in _FLAGS if vars(m).get(flag) is True]
    for module, flag in on:
        setattr(module, flag, False)
    return bool(on)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks to repeat: the outermost elements of containers that are not stages.

    Containers are nn.Sequential, nn.ModuleList and nn.ModuleDict. A block has submodules: repeating
    a single layer would save no memory. A stage contains a container with several elements of one
    class that have submodules: its blocks.
    """
    return list(_blocks(model))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        element = isinstance(module, _CONTAINERS) and not isinstance(child, _CONTAINERS)
        if element and _is_composed(child) and not _is_stage(child):
            yield child
        else:
            yield from _blocks(child)


def _is_stage(module: nn.Module) -> bool:
    for container in module.modules():
        if isinstance(container, _CONTAINERS):
            kinds = [type(child) for child in container.children() if _is_composed(child)]
            if len(kinds) > len(set(kinds)):
                return True
    return False


def _is_composed(module: nn.Module) -> bool:
    return any(True for _ in module.children())


@contextlib.contextmanager
def repeating(
    blocks: Sequence[nn.Module],
    model: nn.Module,
    weights: dict[str, Tensor],
    tangents: Mapping[str, Tensor],
    factors: Mapping[str, Factors],
    kept: Kept,
) -> Iterator[None]:
    """Context, within a ``dual_level()``, in which ``blocks`` save only their inputs.

    Args:
        blocks: modules of ``model``.
        model: the frozen anchor, called within by ``functional_call``.
        weights: its parameters that have a tangent, by name.
        tangents: of these; of those in ``factors``, the trained factor.
        factors: by name.
        kept: the model's caches.
    """
    own = [vars(block).get("forward") for block in blocks]  # None where the class has the only one
    for block in blocks:
        block.forward = _Checkpointed(block, model, weights, tangents, factors, kept)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


class _Checkpointed:
    """A block's forward, recorded by autograd as a single node."""

    def __init__(self, block, model, weights, tangents, factors, kept):
        self.block, self.model = block, model
        self.forward = block.forward  # the module's own, not yet replaced
        self.weights, self.factors = weights, factors
        self.tangents = [tangents[name] for name in weights]
        self.kept = kept

    def __call__(self, *args, **kwargs) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        inputs = [leaves[i] for i in places]
        if not torch.is_grad_enabled() or any(x.requires_grad for x in inputs):
            return self.forward(*args, **kwargs)
        versions, random_state = [x._version for x in inputs], _random_state(inputs)
        try:
            # Not no_grad(): like the model's own no_grad(), it would switch tangents off.
            with torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing):
                output = self.forward(*args, **kwargs)
        except RuntimeError as error:
            if "support saved tensor hooks" not in str(error):
                raise
            return self.forward(*args, **kwargs)  # it uses torch.func.grad itself
        name = type(self.block).__name__
        if [x._version for x in inputs] != versions:
            raise UnsupportedError(
                f"{name} changes its input in place, and cannot be repeated. {_WAY_OUT}"
            )
        if not all(map(torch.equal, random_state, _random_state(inputs))):
            raise UnsupportedError(f"{name} draws random numbers, and is not repeated. {_WAY_OUT}")
        results, output_spec = tree_flatten(output)
        moved, primals, tangents = [], [], []
        for i, result in enumerate(results):
            primal, tangent = (
                forward_ad.unpack_dual(result) if isinstance(result, Tensor) else (None,) * 2
            )
            if primal is not None and tangent is not None:
                moved.append(i)
                primals.append(primal.detach())
                tangents.append(tangent.detach())
        if not moved:
            return output
        pairs = [forward_ad.unpack_dual(x) for x in inputs]
        device = primals[0].device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        for place in places:
            leaves[place] = None
        again = _Again(self, leaves, places, spec, moved, (device, dtype, enabled))
        outputs_t = _Repeated.apply(
            again,
            [pair.primal.detach() for pair in pairs],
            tangents,
            *(pair.tangent for pair in pairs),
            *self.tangents,
        )
        for i, primal, output_t in zip(moved, primals, outputs_t, strict=True):
            results[i] = forward_ad.make_dual(primal, output_t)
        return tree_unflatten(results, output_spec)


@dataclass(frozen=True)
class _Again:
    """What is needed to run a block again, except for its tensors.

    Attributes:
        checkpointed: the block.
        leaves: its flattened arguments, with None in the place of tensors.
        places: indices of the tensors in ``leaves``.
        spec: structure of the arguments.
        moved: indices of the outputs that have a tangent.
        autocast: device, dtype, and whether it was on.
    """

    checkpointed: _Checkpointed
    leaves: list[Any]
    places: list[int]
    spec: TreeSpec
    moved: list[int]
    autocast: tuple[str, torch.dtype, bool]

    def __call__(
        self, inputs: list[Tensor], weights: dict[str, Tensor], trained: dict[str, Tensor]
    ) -> list[Tensor]:
        leaves = list(self.leaves)
        for place, x in zip(self.places, inputs, strict=True):
            leaves[place] = x
        args, kwargs = tree_unflatten(leaves, self.spec)
        within = _Within(self.checkpointed.model, self.checkpointed.forward)
        named = {f"model.{name}": weight for name, weight in weights.items()}
        device, dtype, enabled = self.autocast

        def run() -> Any:
            kept = self.checkpointed.kept.nothing()
            factors = self.checkpointed.factors
            recognising = factored_calls(
                (weights[n], weights[n].detach(), factors[n]._replace(trained=t))
                for n, t in trained.items()
            )
            with kept, torch.autocast(device, dtype=dtype, enabled=enabled), recognising:
                return functional_call(within, named, args, kwargs)

        output = alone(run)
        results = tree_flatten(output)[0]
        return [results[i] for i in self.moved]


class _Within(nn.Module):
    """Calls a block within the model, so that the block may read any parameter of the model."""

    def __init__(self, model: nn.Module, call):
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *args, **kwargs):
        return self.call(*args, **kwargs)


class _Repeated(torch.autograd.Function):
    """Maps tangents of a block's inputs and weights to tangents of its outputs."""

    @staticmethod
    def forward(ctx, again, inputs, outputs_t, *tangents):
        ctx.again = again
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(outputs_t)

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():
            raise UnsupportedError(
                f"derivatives of a gradient through a checkpointed block. {_WAY_OUT}"
            )
        again = ctx.again
        weights, factors = again.checkpointed.weights, again.checkpointed.factors
        count = len(again.places)
        needs = ctx.needs_input_grad[3:]
        with torch.enable_grad():
            inputs = [
                x.detach().requires_grad_(need)
                for x, need in zip(ctx.saved_tensors, needs[:count], strict=True)
            ]
            leaves = {
                name: weight.detach().requires_grad_(need)
                for (name, weight), need in zip(weights.items(), needs[count:], strict=True)
            }
            trained = {
                name: torch.zeros_like(each.trained).requires_grad_()
                for name, each in factors.items()
                if leaves[name].requires_grad
            }
            outputs = again(inputs, leaves, trained)
        operands = [*inputs, *leaves.values()]
        reached = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if grad is not None]
        wanted = [x for x in operands if x.requires_grad] + list(trained.values())
        found = iter(
            torch.autograd.grad(
                [y for y, _ in reached], wanted, [grad for _, grad in reached], allow_unused=True
            )
            if reached
            else ()
        )
        gradients = [next(found, None) if need else None for need in needs]
        for name in trained:
            place = count + list(weights).index(name)
            gradients[place] = _by_factor(next(found, None), gradients[place], factors[name])
        return None, None, None, *gradients


def _by_factor(
    by_trained: Tensor | None, by_weight: Tensor | None, factors: Factors
) -> Tensor | None:
    """The gradient by the trained factor, also from functions that got the weight itself."""
    if by_weight is None:
        return by_trained
    rest = factors.gradient(by_weight.flatten(1))
    return rest if by_trained is None else by_trained + rest


def _nothing(_: Any) -> Any:
    """Saves nothing: this graph has no backward pass."""


def _random_state(inputs: list[Tensor]) -> list[Tensor]:
    devices = {x.device for x in inputs if x.is_cuda}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
