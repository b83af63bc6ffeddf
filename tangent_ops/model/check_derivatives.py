"""Checks J against the ordinary model's gradients, exactly, on one sample.

For a random cotangent H, let g_p be the ordinary gradient of ⟨H, f⟩ by parameter p at w0. Set

    Δ_p = s_p g_p / ‖g_p‖²          s_p = ±1 at random

Then ⟨H, JΔ⟩ = Σ s_p, an integer. Every parameter contributes exactly ±1, so a lost tangent changes
the sum, however small the parameter's gradient is. The gradient of ⟨H, JΔ⟩ by Δ_p is g_p.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

from tangent_ops.errors import UnsupportedError, few
from tangent_ops.model.checkpointing import find_blocks
from tangent_ops.model.copies import independent_copy
from tangent_ops.model.dual_call import dual_call
from tangent_ops.model.eval_caches import Kept
from tangent_ops.model.missing_formulas import naming_what_lacks
from tangent_ops.model.sharded import refuse_sharded
from tangent_ops.ops.backend import in_forward_ad
from tangent_ops.ops.checkpoint_guard import saved_tensors_hook
from tangent_ops.ops.factored import Factors
from tangent_ops.ops.levels import backward, is_compiling

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
Vectors = dict[str, Tensor]

# A lost tangent changes the sum by one; rounding may change it by this much.
_FAR = 0.25
# Two gradients of one parameter that differ by half of it disagree in every precision.
_HALF = 0.5
_CAUSES = (
    "Common causes: a tensor that depends on weights and is kept from an earlier call (in a global "
    "or a closure, say); a torch.autograd.Function whose jvp and backward differ; a function that "
    "uses another model's parameters; a checkpointed block that reads tensors that are not its "
    "arguments. Train other parameters (`trainable`), or pass check=False if J is right"
)


def can_check(anchor: nn.Module, inputs: Any) -> bool:
    """Whether a check can run now: with values, and outside of transforms, tracers and modes."""
    tensors = [x for x in (*anchor.parameters(), *tree_leaves(inputs)) if isinstance(x, Tensor)]
    return (
        not is_compiling()
        and not in_forward_ad()
        and peek_interpreter_stack() is None
        and _get_current_dispatch_mode() is None
        and not any(x.is_meta or isinstance(x, FakeTensor) for x in tensors)
    )


def check_adjoint(
    anchor: nn.Module,
    names: Iterable[str],
    factors: Mapping[str, Factors],
    kept: Kept,
    blocks: Sequence[nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> list[str] | None:
    """Compare J and its transpose with the ordinary model's gradients, on the first sample.

    The check runs a forward and a backward pass of the ordinary model, the same of the dual model,
    and one more dual forward pass, which would find tensors that the other passes left in a cache.
    If rounding leaves a doubt, the check runs again in another precision.

    Args:
        anchor: frozen, in eval mode; it does not change.
        names: names of the trained parameters.
        factors: of those whose Δ are L T R, with fixed L and R: T and its gradient are compared.
        kept: the anchor's caches.
        blocks: blocks that are repeated in the backward pass.
        args: arguments of a call of the model; their first dimension is the batch.
        kwargs: keyword arguments of that call.

    Returns:
        Names of parameters that get no gradient in the ordinary model either; None if the anchor
        itself fails with these inputs or returns NaN, so that a later call has to be checked.

    Raises:
        UnsupportedError: a parameter's derivative gets lost, or an operation has none; or the
            anchor is under FSDP.
    """
    refuse_sharded(anchor)
    devices = {p.device for p in anchor.parameters() if p.is_cuda}
    with (
        torch.random.fork_rng(devices),
        _no_hooks(),
        torch.enable_grad(),
    ):
        side = functools.partial(_Side, anchor, tuple(names), factors, kept, blocks)
        own = _first_that_runs(side, _samples((args, kwargs)))
        if own is None or not all(map(math.isfinite, own.sizes.values())):
            return None
        try:
            idle = _judge(own)
        except UnsupportedError:
            # PyTorch's own gradient of batch norm is wrong for some layouts of one sample.
            twice = _first_that_runs(side, [_twice(own.inputs)])
            idle = None
            if twice is not None:
                with contextlib.suppress(UnsupportedError):
                    idle = _judge(twice)
            if idle is None:
                raise
    return idle


class _Side:
    """The anchor in one precision, with its ordinary gradients and those through J.

    Attributes:
        epsilon: rounding unit of its dtype, or of autocast's.
        ordinary: g_p by name; zeros where there is none.
        sizes: ‖g_p‖ by name.
        differences: ‖g_p - gradient of ⟨H, JΔ⟩ by Δ_p‖ by name, after ``pull_back()``.
    """

    def __init__(
        self,
        anchor: nn.Module,
        names: tuple[str, ...],
        factors: Mapping[str, Factors],
        kept: Kept,
        blocks: Sequence[nn.Module],
        inputs: Inputs,
    ) -> None:
        self.anchor, self.names, self.kept, self.blocks = anchor, names, kept, blocks
        self.factors, self.inputs = factors, inputs
        self.weights = {name: anchor.get_parameter(name) for name in names}
        types = {weight.dtype for weight in self.weights.values()}
        device = next(iter(self.weights.values())).device.type
        if torch.is_autocast_enabled(device):
            types.add(torch.get_autocast_dtype(device))
        self.epsilon = max(torch.finfo(dtype).eps for dtype in types)
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (len(names),), generator=generator) * 2 - 1
        self.signs = dict(zip(names, signs.tolist(), strict=True))
        self.ordinary = self._ordinary()
        self.sizes = {name: _norm(gradient) for name, gradient in self.ordinary.items()}

    def _ordinary(self) -> Vectors:
        flags = {p: p.requires_grad for p in self.anchor.parameters()}
        try:
            for weight in self.weights.values():
                weight.requires_grad_()
            with self.kept.nothing():
                args, kwargs = self._again()
                outputs = _floating(self.anchor(*args, **kwargs))
                generator = torch.Generator().manual_seed(1)
                self.cotangents = [
                    torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs
                ]
                found = self._gradients(outputs, self.weights)
                for name, factors in self.factors.items():
                    found[name] = factors.gradient(found[name].flatten(1))
                return found
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)

    def pull_back(self) -> None:
        """Compute the gradients of ⟨H, JΔ⟩ by Δ_p and their distances from the ordinary ones."""
        zeros = {n: torch.zeros_like(g).requires_grad_() for n, g in self.ordinary.items()}
        tangents = self._tangents(zeros)
        with naming_what_lacks(self.anchor):
            through_tangent = self._gradients(tangents, zeros)
        self.differences = {n: _norm(g - through_tangent[n]) for n, g in self.ordinary.items()}

    def counted(self, names: Iterable[str]) -> float:
        """⟨H, JΔ⟩ - Σ s_p over these parameters; all others have Δ_p = 0."""
        chosen, generator = set(names), torch.Generator().manual_seed(2)
        directions, expected = {}, 0
        for name, gradient in self.ordinary.items():
            size = self.sizes[name]
            if name not in chosen:
                directions[name] = torch.zeros_like(gradient)
            elif size:
                expected += self.signs[name]
                exact = gradient.double() * (self.signs[name] / size**2)
                directions[name] = exact.to(gradient.dtype)
            else:  # contributes nothing in any direction
                noise = torch.randn(gradient.shape, generator=generator)
                directions[name] = noise.to(gradient.device, gradient.dtype)
        with torch.no_grad():
            pairs = zip(self._tangents(directions), self.cotangents, strict=True)
            return sum(float((t.double() * h.double()).sum()) for t, h in pairs) - expected

    def adds_up(self, names: Iterable[str]) -> bool:
        return abs(self.counted(names)) <= _FAR  # False for NaN

    def copied(self, dtype: torch.dtype) -> _Side | None:
        """The same for a copy in another precision; None if that fails."""
        try:
            anchor = independent_copy(self.anchor).to(dtype)
            inputs = tree_map(
                lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x,
                self.inputs,
            )
            blocks = find_blocks(anchor) if self.blocks else []
            for module in (anchor, *blocks):  # blocks run again without the anchor around them
                module.forward = functools.partial(_with_exact_softmax, module.forward)
            factors = {name: each.to(dtype) for name, each in self.factors.items()}
            side = _Side(anchor, self.names, factors, Kept(anchor), blocks, inputs)
            side.pull_back()
        except Exception:  # an operation may support one dtype only
            return None
        return side

    def _tangents(self, directions: Vectors) -> list[Tensor]:
        args, kwargs = self._again()
        within = {n: f._replace(trained=directions[n]) for n, f in self.factors.items()}
        whole = {**directions, **within}
        try:
            _, tangent = dual_call(self.anchor, whole, self.kept, args, kwargs, self.blocks)
        except (UnsupportedError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedError(
                f"the model runs, but not with dual parameters: {type(error).__name__}: {error}"
            ) from error
        return _floating(tangent)

    def _again(self) -> Inputs:
        """Fresh copies of the inputs, since a model may change them; the seed is set again."""
        torch.manual_seed(0)
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.inputs)

    def _gradients(self, outputs: list[Tensor], leaves: Mapping[str, Tensor]) -> Vectors:
        pairs = [(y, h) for y, h in zip(outputs, self.cotangents, strict=True) if y.requires_grad]
        found: Iterable[Tensor | None] = [None] * len(leaves)
        if pairs:
            found = backward(
                lambda: torch.autograd.grad(
                    [y for y, _ in pairs],
                    list(leaves.values()),
                    [h for _, h in pairs],
                    allow_unused=True,
                )
            )
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)
        }


class _ExactSoftmax(TorchFunctionMode):
    """Softmax in float64 where a model asks for float32, as Hugging Face's eager attention does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _SOFTMAX and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = args[0].dtype
        return func(*args, **kwargs)


_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


def _with_exact_softmax(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _ExactSoftmax():
        return forward(*args, **kwargs)


def _judge(own: _Side) -> list[str]:
    """Raise UnsupportedError if a derivative gets lost.

    Returns:
        Names of parameters that get no gradient at all.
    """
    own.pull_back()
    # Rounding takes at most half of the digits; for larger differences another precision decides.
    close = 4 * own.epsilon**0.5
    doubtful = [n for n in own.names if not own.differences[n] <= close * own.sizes[n]]
    if not doubtful and own.adds_up(own.names):
        return [n for n in own.names if own.sizes[n] == 0]
    exact = own.copied(torch.float64)
    other = own.copied(torch.float32) if own.epsilon == torch.finfo(torch.float64).eps else own
    if exact is None or other is None:
        # Only this is known without it: rounding is small compared with the largest gradient.
        largest = max(own.sizes.values())
        lost = [n for n in doubtful if not own.differences[n] <= 100 * own.epsilon * largest]
        if not lost and own.epsilon <= torch.finfo(torch.float32).eps:
            lost = _find_lost(own, [n for n in own.names if n not in doubtful])
        _refuse(own, lost)
        return [n for n in own.names if own.sizes[n] == 0]
    coarse, fine = other, exact
    largest = max(fine.sizes.values())
    lost, countable = [], []
    for name in own.names:
        # A gradient that is only rounding, such as that of the bias of a key: exactly zero.
        apart = _norm(coarse.ordinary[name].double() - fine.ordinary[name].double())
        noise = apart > _HALF * coarse.sizes[name]
        nothing = fine.sizes[name] <= max(1e-3 * coarse.sizes[name], 1e-9 * largest)
        if noise and nothing:
            continue
        countable.append(name)
        agree = fine.differences[name] <= 1e-3 * fine.sizes[name]
        if not agree or not (noise or coarse.differences[name] <= _HALF * coarse.sizes[name]):
            lost.append(name)
    _refuse(own, lost or _find_lost(fine, countable))
    return [n for n in own.names if coarse.sizes[n] == fine.sizes[n] == 0]


def _find_lost(side: _Side, names: list[str]) -> list[str]:
    """One parameter missing from ⟨H, JΔ⟩, found by halving; none if the sum is right."""
    if not names or side.adds_up(names):
        return []
    while len(names) > 1:
        half = names[: len(names) // 2]
        names = half if not side.adds_up(half) else names[len(half) :]
    return names


def _refuse(side: _Side, lost: list[str]) -> None:
    if not lost:
        return
    owners = {name.rpartition(".")[0] for name in lost}
    kinds = {type(side.anchor.get_submodule(owner)).__name__ for owner in owners}
    raise UnsupportedError(
        f"the derivative by {few(lost)} (in {few(sorted(kinds))}) gets lost: J(x) Δw or its "
        f"gradient is not what the ordinary model's gradient says, on one sample. {_CAUSES}"
    )


def _first_that_runs(side: Callable[[Inputs], _Side], candidates: Iterable[Inputs]) -> _Side | None:
    for inputs in candidates:
        try:
            return side(inputs)
        except UnsupportedError:
            raise
        except Exception:  # the model may raise anything
            continue
    return None


def _samples(inputs: Inputs) -> Iterator[Inputs]:
    """The first sample, then the whole batch, for models of a fixed batch size."""
    batch = _batch_size(inputs)
    whole = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, inputs)
    if batch > 1:
        yield tree_map(lambda x: x[:1] if _is_batch(x, batch) else x, whole)
    yield whole


def _twice(inputs: Inputs) -> Inputs:
    batch = _batch_size(inputs)
    return tree_map(lambda x: torch.cat([x, x]) if _is_batch(x, batch) else x, inputs)


def _batch_size(inputs: Inputs) -> int:
    return next((len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.ndim), 1)


def _is_batch(x: Any, batch: int) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and len(x) == batch


def _floating(outputs: Any) -> list[Tensor]:
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _no_hooks() -> contextlib.AbstractContextManager[Any]:
    """Replaces outer hooks on saved tensors, such as those of a checkpoint around the call."""
    if saved_tensors_hook() is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
