"""What to compare compositions with: soups and ensembles of ordinary fine-tuned models.

Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time", ICML 2022 (arXiv:2203.05482).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tangent_ops.data import Data
from tangent_ops.errors import ArgumentError
from tangent_ops.evaluate import accuracy
from tangent_ops.model.linearized import LinearizedModel

State = Mapping[str, Tensor]


def uniform_soup(models: Iterable[nn.Module | State]) -> dict[str, Tensor]:
    """Average models' weights: the mean of their state dicts.

    Args:
        models: modules of one architecture, or their state dicts. An iterator is consumed.

    Returns:
        A state dict in the first one's dtypes and on its device, for ``load_state_dict``;
        floating-point entries are averaged in float64, all others equal in all models.

    Raises:
        ArgumentError: no models, something else, linearized ones, or state dicts that differ in
            names, shapes or dtypes, or in an entry that is not floating-point.
    """
    if isinstance(models, (nn.Module, Mapping)):
        raise ArgumentError(f"models must be several, got one {type(models).__name__}: use a list")
    first: State = {}
    sums: dict[str, Tensor] = {}  # float64
    count = 0
    for model in models:
        state = _state(model, count)
        if count == 0:
            first = state
            floating = {name: v for name, v in state.items() if v.is_floating_point()}
            sums = {name: v.to(torch.float64, copy=True) for name, v in floating.items()}
        else:
            _check_alike(state, first, f"model {count}")
            for name, total in sums.items():
                total.add_(state[name].to(total.device))
        count += 1
    if count == 0:
        raise ArgumentError("models is empty: there is nothing to average")
    return {
        name: (sums[name] / count).to(value.dtype) if name in sums else value.clone()
        for name, value in first.items()
    }


def greedy_soup(
    models: Sequence[nn.Module],
    data: Data,
    *,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> tuple[dict[str, Tensor], list[int]]:
    """Average those models that do the average good (Recipe 1 of the paper).

    In the order of their validation accuracy, best first and ties as they come, each model is added
    to the soup if the soup's accuracy does not fall.

    Args:
        models: of one architecture; they are left alone: a copy of the first one runs.
        data: validation data, a Dataset or DataLoader of (input, target), without random
            augmentation.
        batch_size: of a Dataset; a DataLoader has its own.
        device: where the copy runs; None for where the first model is.
        progress: show a bar if a pass over the data takes more than two seconds.

    Returns:
        The soup's state dict, and the positions of the models in it, in the order they were added.

    Raises:
        ArgumentError: as :func:`uniform_soup` and :func:`tangent_ops.accuracy`, or state dicts
            instead of models.
    """
    if isinstance(models, (nn.Module, Mapping)):
        raise ArgumentError(f"models must be several, got one {type(models).__name__}: use a list")
    models = _modules(models)
    uniform_soup(models)  # checked before any work
    running = copy.deepcopy(models[0])

    def tried(members: list[int]) -> tuple[dict[str, Tensor], float]:
        soup = uniform_soup(models[index] for index in members)
        running.load_state_dict(soup)
        settings = {"batch_size": batch_size, "device": device, "progress": progress}
        return soup, accuracy(running, data, **settings)

    alone = [tried([index])[1] for index in range(len(models))]
    best, *others = sorted(range(len(models)), key=lambda index: -alone[index])
    members, best_accuracy = [best], alone[best]
    soup = uniform_soup([models[best]])
    for index in others:
        candidate, found = tried([*members, index])
        if found >= best_accuracy:
            soup, best_accuracy = candidate, found
            members.append(index)
    return soup, members


class Ensemble(nn.Module):
    """Models whose outputs (logits, say) are averaged; it costs as much as all of them.

    Args:
        models: modules of the same inputs and outputs. They are held, not copied.

    Raises:
        ArgumentError: no models, or something else.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(_modules(models))

    def forward(self, *args, **kwargs) -> Tensor:
        """Mean of the models' outputs.

        Raises:
            ArgumentError: an output is no tensor, or their shapes differ.
        """
        outputs = [model(*args, **kwargs) for model in self.models]
        for index, output in enumerate(outputs):
            if not isinstance(output, Tensor):
                kind = type(output).__name__
                raise ArgumentError(f"model {index} returns a {kind}, not a tensor: wrap it")
            if output.shape != outputs[0].shape:
                raise ArgumentError(
                    f"model {index} returns shape {tuple(output.shape)}, model 0 "
                    f"{tuple(outputs[0].shape)}: they have to be alike"
                )
        return torch.stack(outputs).mean(dim=0)


def _modules(models: Iterable[nn.Module]) -> list[nn.Module]:
    models = list(models)
    for index, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model {index} must be an nn.Module, got a {type(model).__name__}")
    if not models:
        raise ArgumentError("models is empty: there is nothing to average")
    return models


def _state(model: nn.Module | State, index: int) -> State:
    if isinstance(model, LinearizedModel):
        raise ArgumentError(f"model {index} is linearized: use compose on deltas instead")
    if not isinstance(model, (nn.Module, Mapping)):
        kind = type(model).__name__
        raise ArgumentError(f"model {index} must be an nn.Module or a state dict, got a {kind}")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    for name, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ArgumentError(f"model {index}: {name} is a {kind}, only tensors are averaged")
    return {name: value.detach() for name, value in state.items()}


def _check_alike(state: State, first: State, what: str) -> None:
    """Raise ArgumentError, naming what differs, unless the state dicts can be averaged."""
    if differing := sorted(state.keys() ^ first.keys()):
        name = differing[0]
        where = f"{what} has, the first lacks" if name in state else f"{what} lacks"
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise ArgumentError(f"models must have the same names: {where} {name}{more}")
    for name, value in first.items():
        other = state[name]
        if other.shape != value.shape or other.dtype != value.dtype:
            raise ArgumentError(
                f"{what}: {name} is {other.dtype} of shape {tuple(other.shape)}, the first's is "
                f"{value.dtype} of shape {tuple(value.shape)}"
            )
        if not value.is_floating_point() and not torch.equal(other.to(value.device), value):
            raise ArgumentError(
                f"{what}: {name} ({value.dtype}) differs from the first's and cannot be averaged: "
                "make it equal in all models"
            )
