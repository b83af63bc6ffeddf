"""`fit_grouped`: train several shards at once; the anchor runs once for all of them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader
from tqdm import tqdm

from tangent_ops.data import Data, as_loader, place, unpack
from tangent_ops.delta import Delta
from tangent_ops.errors import ArgumentError, NonFiniteLossError, UnsupportedError
from tangent_ops.family import family_of
from tangent_ops.fields import Fields, Inputs, each_tensor, named_tensors
from tangent_ops.losses import Loss
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.ops.attention.frozen import frozen_attention
from tangent_ops.ops.levels import functional_call
from tangent_ops.training.loop import (
    cached_loader,
    check_precision,
    loss_of,
    own_generators,
    penalized_norm,
    seeded,
)
from tangent_ops.training.options import OPTIMIZERS, Recipe, RecipeOptions, recipe_of
from tangent_ops.training.processes import Batch
from tangent_ops.training.subnormals import flushed_subnormals


def fit_grouped(
    tangent: LinearizedModel,
    shards: Mapping[str, Data],
    recipe: Recipe | None = None,
    *,
    cache: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
    **options: Unpack[RecipeOptions],
) -> dict[str, Delta]:
    """Train one delta per shard, all in one process, in common steps.

    A step runs the batches of G shards of b samples as one. Products with the anchor's weights are
    over all G b rows; products of each shard's delta with its own rows are batched
    (`torch.func.vmap`). No row depends on another shard's delta, so one backward pass of the sum of
    the losses gives each shard its own gradient. This saves time if b is small. The activations of
    all G b rows are kept: ``grad_checkpointing`` is not used.

    Each shard has the batches, steps and learning rates of ``fit(tangent, shard, recipe)``, so
    deltas are those of separate fits up to rounding. Batches of another shape, such as the last one
    of an epoch, run in a step of their own. A shard leaves after its last step. Subnormal numbers
    are flushed to zero as in `fit`.

    Args:
        tangent: where each shard starts; its own deltas stay as they are.
        shards: name -> data as in `fit`: a Dataset of (input, target), or a DataLoader.
        recipe: how to train each shard, over its own steps and from its own seed; None for
            `Recipe()`. accumulate is not used.
        cache: compute the outputs of the frozen blocks below the first trained one only once, in
            memory, for all shards; for inputs without random augmentation.
        device: as in `fit`.
        progress: show a progress bar, of the steps of all shards.
        options: fields of the `Recipe`, which replace those of `recipe`.

    Returns:
        Name -> delta, on the model's device, with the name as ``meta.shard``.

    Raises:
        ArgumentError: an argument out of range, or an unknown one; no shards, an empty one, or one
            under two names; a parameter of the anchor requires a gradient; a loss that does not
            depend on deltas.
        UnsupportedError: cache, for a model that cannot be split; float16; a model that
            `torch.func.vmap` cannot run, which is tested on noise before the first common step.
        NonFiniteLossError: the loss of a shard or its gradient is NaN or infinite.
    """
    unused = {"accumulate": "give a smaller batch_size, or fit one shard after the other"}
    recipe = recipe_of(fit_grouped, recipe, options, unused=unused)
    _check_model(tangent)
    if not isinstance(cache, bool):
        raise ArgumentError(f"cache must be True or False, got {cache!r}: it is kept in memory")
    loaders = _loaders(shards, recipe.batch_size)
    where = place(tangent, device)
    check_precision("fit_grouped", tangent, where, recipe)
    model = tangent
    if cache:
        trunk, model = tangent.split()
        loaders = {
            name: cached_loader(trunk, loader, None, where, recipe, progress)
            for name, loader in loaders.items()
        }
    with ExitStack() as generators:
        for loader in loaders.values():
            generators.enter_context(seeded(recipe.seed, where, loader))
        running = [Shard(n, tangent, loader, where, recipe) for n, loader in loaders.items()]
        with flushed_subnormals(where):
            _train(model, running, where, recipe, progress)
    return {shard.name: shard.delta(tangent) for shard in running}


class Shard:
    """The training of one shard: its delta, optimizer, generators and batches."""

    def __init__(
        self,
        name: str,
        tangent: LinearizedModel,
        loader: DataLoader[Any],
        device: torch.device,
        recipe: Recipe,
    ) -> None:
        self.name = name
        self.parameters = {
            n: nn.Parameter(p.detach().clone())
            for n, p in tangent.deltas().items()
            if p.requires_grad
        }
        self.batch: Batch | None = None
        self.done = 0
        self.steps = recipe.epochs * len(loader)
        self._recipe = recipe
        self._optimizer = OPTIMIZERS[recipe.optimizer]([*self.parameters.values()], recipe.lr)
        self._device = device
        self._generators = _Generators(loader, device)
        self._batches = self._read(loader)

    def advance(self) -> None:
        """Read the next batch; None at the end."""
        try:
            with self._generators.own():
                self.batch = next(self._batches, None)
        except ArgumentError as error:
            raise ArgumentError(f"shard {self.name!r}: {error}") from error

    def loss(self, outputs: Any, loss: Loss) -> Tensor:
        """The loss of the outputs for this shard's batch."""
        assert self.batch is not None
        with self._generators.own():
            return loss_of(outputs, self.batch[1], loss)

    def penalize(self) -> Tensor:
        """Add the penalty's gradient; return the norm of the sum, not finite if any of it is."""
        return penalized_norm([*self.parameters.values()], self._recipe.l2)

    def step(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.done += 1

    @property
    def lr(self) -> float:
        return self._recipe.lr_at(self.done / self.steps)

    def delta(self, tangent: LinearizedModel) -> Delta:
        start = tangent.delta_dict()
        assert start.meta is not None
        trained = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return Delta({**start, **trained}, replace(start.meta, shard=self.name))

    def _read(self, loader: DataLoader[Any]) -> Iterator[Batch]:
        for _ in range(self._recipe.epochs):
            empty = True
            for batch in loader:
                empty = False
                yield unpack(batch, self._device)
            if empty:
                raise ArgumentError("data has a length, but yielded no batch")


class _Generators:
    """A shard's own states of the generators that all shards share.

    Construct it while the generators are seeded for this shard. Each use leaves the generators in
    the state of the shard that used them last.
    """

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self._torch = [torch.default_generator, *own_generators(loader)]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._torch.append(torch.cuda.default_generators[index])
        self._states = self._now()

    @contextmanager
    def own(self) -> Iterator[None]:
        states, numpy, python = self._states
        for generator, state in zip(self._torch, states, strict=True):
            generator.set_state(state)
        np.random.set_state(numpy)
        random.setstate(python)
        yield
        self._states = self._now()

    def _now(self) -> tuple[list[Tensor], Any, Any]:
        states = [generator.get_state() for generator in self._torch]
        return states, np.random.get_state(), random.getstate()


def _train(
    model: LinearizedModel,
    shards: list[Shard],
    device: torch.device,
    recipe: Recipe,
    progress: bool,
) -> None:
    total = sum(shard.steps for shard in shards)
    checked = False
    for shard in shards:
        shard.advance()
    with tqdm(total=total, desc="fit", unit="step", disable=not progress) as bar:
        while groups := _alike(shards):
            for group in groups:
                if len(group) > 1 and not checked:
                    _check_vmap(model, group)
                    checked = True
                step(model, group, device, recipe)
                for shard in group:
                    shard.advance()
                bar.update(len(group))


def _alike(shards: list[Shard]) -> list[list[Shard]]:
    """The shards that have a batch left, grouped by the shape and dtype of its inputs."""
    groups: dict[tuple[object, object], list[Shard]] = {}
    for shard in shards:
        if shard.batch is not None:
            inputs = shard.batch[0]
            groups.setdefault((inputs.shape, inputs.dtype), []).append(shard)
    return [*groups.values()]


def step(model: LinearizedModel, group: list[Shard], device: torch.device, recipe: Recipe) -> None:
    """One step of shards whose batches have the same shape and dtype."""
    loss = recipe.loss_function
    inputs = [shard.batch[0] for shard in group if shard.batch is not None]
    with recipe.autocast(device):
        outputs = forward(model, [shard.parameters for shard in group], inputs)
    values = [shard.loss(own, loss) for shard, own in zip(group, outputs, strict=True)]
    with torch.autocast(device.type, enabled=False):  # a caller's context would round once more
        torch.autograd.backward(values)
    norms = [shard.penalize() for shard in group]
    # Read together, so that the device is synchronised once.
    found = torch.stack([*(v.detach().double() for v in values), *(n.double() for n in norms)])
    for shard, *pair in zip(group, *found.view(2, -1).tolist(), strict=True):
        if not all(map(math.isfinite, pair)):
            raise NonFiniteLossError(
                f"the loss of shard {shard.name!r} or its gradient is not finite in step "
                f"{shard.done + 1} of {shard.steps}, at lr={shard.lr:.3g}; the model's own deltas "
                "are as before. Check its inputs for NaN, or try a lower lr or amp=False"
            )
    for shard in group:
        shard.step()


def forward(
    model: LinearizedModel, deltas: list[dict[str, nn.Parameter]], inputs: list[Inputs]
) -> list[Any]:
    """The outputs for each shard's inputs with its deltas."""

    named = isinstance(inputs[0], Fields)
    family = family_of(model)

    def run(own: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Any:
        args, fields = ((), dict(batch)) if named else ((batch[""],), {})
        given = {f"delta.{name}": delta for name, delta in own.items()}
        return family.logits(functional_call(model, given, args, fields))

    batches = [named_tensors(each) for each in inputs]
    if len(inputs) == 1:
        return [run(deltas[0], batches[0])]
    stacked = {name: torch.stack([own[name] for own in deltas]) for name in deltas[0]}
    together = {name: torch.stack([each[name] for each in batches]) for name in batches[0]}
    with frozen_attention():
        outputs = vmap(run)(stacked, together)
    return [
        tree_map(lambda x, i=i: x[i] if isinstance(x, Tensor) else x, outputs)
        for i in range(len(inputs))
    ]


@torch.no_grad()
def _check_vmap(model: LinearizedModel, group: list[Shard]) -> None:
    """Compare two shards together with one after the other, on noise."""
    noise = torch.Generator().manual_seed(0)

    def like(tensor: Tensor, scale: float) -> Any:
        drawn = scale * torch.randn(tensor.shape, generator=noise, dtype=torch.float64)
        return drawn.to(tensor.device, tensor.dtype)

    def noisy(tensor: Tensor) -> Tensor:
        return like(tensor, 1.0) if tensor.is_floating_point() else tensor

    inputs = [shard.batch[0][:2] for shard in group[:2] if shard.batch is not None]
    inputs = [each_tensor(batch, noisy) for batch in inputs]
    deltas = [{n: like(p, 0.1) for n, p in shard.parameters.items()} for shard in group[:2]]
    expected = [forward(model, [own], [x])[0] for own, x in zip(deltas, inputs, strict=True)]
    try:
        found = forward(model, deltas, inputs)
    except (RuntimeError, ValueError) as error:  # what vmap raises where it cannot run a model
        raise UnsupportedError(
            f"{model.model_name} cannot train several shards at once, because torch.func.vmap "
            f"cannot run it: {error}. Fit one shard after the other"
        ) from error
    for one, right in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if not isinstance(right, Tensor) or not right.is_floating_point():
            continue
        largest = float(right.nan_to_num(0.0, 0.0, 0.0).abs().max())
        tolerance = 3 * torch.finfo(right.dtype).eps ** 0.5 * largest
        if not torch.isclose(one, right, rtol=0.0, atol=tolerance, equal_nan=True).all():
            raise UnsupportedError(
                f"{model.model_name} cannot train several shards at once: tried on noise, its "
                "outputs for two together differ from those for one after the other, as if it kept "
                "state from call to call. Fit one shard after the other"
            )


def _check_model(tangent: LinearizedModel) -> None:
    if not isinstance(tangent, LinearizedModel):
        kind = type(tangent).__name__
        raise ArgumentError(f"tangent must be a LinearizedModel, got a {kind}: use linearize")
    if not any(delta.requires_grad for delta in tangent.deltas().values()):
        raise ArgumentError("tangent has no trainable deltas: all have requires_grad=False")
    trained = [name for name, p in tangent.anchor.named_parameters() if p.requires_grad]
    if trained:
        raise ArgumentError(
            f"the anchor's {trained[0]} has requires_grad=True, but shards share the anchor: call "
            "tangent.anchor.requires_grad_(False)"
        )


def _loaders(shards: Mapping[str, Data], batch_size: int) -> dict[str, DataLoader[Any]]:
    if not isinstance(shards, Mapping) or not shards:
        got = f"a {type(shards).__name__}" if not isinstance(shards, Mapping) else "none"
        raise ArgumentError(f"shards must be a dict from name to data, got {got}")
    loaders: dict[str, DataLoader[Any]] = {}
    names: dict[int, str] = {}
    for name, data in shards.items():
        if not isinstance(name, str):
            raise ArgumentError(f"a shard's name must be a string, got {name!r}: use str(...)")
        try:
            loaders[name] = as_loader(data, batch_size, shuffle=True)
        except ArgumentError as error:
            raise ArgumentError(f"shard {name!r}: {error}") from error
        other = names.setdefault(id(data), name)
        if other != name:
            raise ArgumentError(
                f"shards {other!r} and {name!r} are the same data: give each shard its own"
            )
    return loaders
