"""`fit_head`: train a linear probe on features that are computed once."""

from __future__ import annotations

import copy
import time
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from tangent_ops.data import Data, as_loader, check_integer, place
from tangent_ops.delta import fingerprint
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.training.loop import History, cached_loader, check_group, seeded, train
from tangent_ops.training.options import Recipe, RecipeOptions, recipe_of
from tangent_ops.training.processes import Group

PROBE = Recipe(lr=1e-2)  # a probe takes a higher rate than the blocks


class PreLogits(nn.Module):
    """The features that a timm model passes to its classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(inputs), pre_logits=True)


def fit_head(
    model: nn.Module,
    data: Data,
    recipe: Recipe | None = None,
    *,
    num_classes: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    **options: Unpack[RecipeOptions],
) -> tuple[nn.Module, History]:
    """Train a linear probe: a new classifier, from zeros, on features computed once.

    In a group of processes it works like `fit`; each process computes all features.

    Linearize a model after this, not before: while its classifier is zero, no block below it has a
    derivative, and its tangent model is only a probe.

    Args:
        model: a timm model (forward_features, forward_head, get_classifier, reset_classifier) whose
            classifier is one linear layer. It is not changed.
        data: as in `fit`, without random augmentation: it would be drawn once.
        recipe: how to train; None for ``Recipe(lr=1e-2)``. l2 is of the classifier only.
        num_classes: of the new classifier; None for as many as the model has.
        device: where the copy goes; None for where the model is.
        progress: show a progress bar; in a group the first process does.
        options: fields of the `Recipe`, which replace those of `recipe`.

    Returns:
        A copy of the model with the trained classifier, in eval mode, and the history.

    Raises:
        ArgumentError: as in `fit`; num_classes is missing for a model without classifier.
        UnsupportedError: not a timm model, or its classifier is not one linear layer.
        NonFiniteLossError: as in `fit`.
    """
    start = time.perf_counter()
    recipe = recipe_of(fit_head, recipe, options, PROBE)
    if num_classes is not None:
        check_integer("num_classes", num_classes, 1)
    loader = as_loader(data, recipe.batch_size, shuffle=True)
    model = copy.deepcopy(model).eval()
    with seeded(recipe.seed, torch.device("cpu")):  # reset_classifier draws weights
        head = zero_head(model, num_classes)
    where = place(model, device)
    group = Group(where)
    check_group(group, model, loader, recipe)
    if group.world > 1:
        group.agree(model=fingerprint(model.state_dict()))
    show = progress and group.rank == 0
    loader = cached_loader(PreLogits(model), loader, None, where, recipe, show)
    history = train(head, loader, group, recipe, progress)
    history.seconds = time.perf_counter() - start
    return model, history


def zero_head(model: Any, num_classes: int | None) -> nn.Linear:
    """Reset the model's classifier, if num_classes is given, and set it to zeros.

    Raises:
        ArgumentError: there is no classifier.
        UnsupportedError: not a timm model, or its classifier is not one linear layer.
    """
    needed = ("forward_features", "forward_head", "get_classifier", "reset_classifier")
    missing = [name for name in needed if not hasattr(model, name)]
    if missing:
        kind = type(model).__name__
        raise UnsupportedError(f"fit_head needs a timm model; this {kind} lacks {missing}")
    if num_classes is not None:
        model.reset_classifier(num_classes)
    head = model.get_classifier()
    if isinstance(head, nn.Identity):
        raise ArgumentError("model has no classifier: pass num_classes")
    if not isinstance(head, nn.Linear):
        kind = type(head).__name__
        raise UnsupportedError(f"fit_head needs one nn.Linear as classifier, this is a {kind}")
    for parameter in head.parameters():
        nn.init.zeros_(parameter.requires_grad_())
    return head
