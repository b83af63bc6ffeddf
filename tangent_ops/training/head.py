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
from tangent_ops.family import family_of, heads_of, names_of
from tangent_ops.training.loop import History, cached_loader, check_group, seeded, train
from tangent_ops.training.options import Recipe, RecipeOptions, recipe_of
from tangent_ops.training.processes import Group

PROBE = Recipe(lr=1e-2)  # a probe takes a higher rate than the blocks


class PreLogits(nn.Module):
    """The features that a model passes to its linear classifier.

    Args:
        model: whose logits are the classifier's output, which every call checks.
        head: its classifier.
    """

    def __init__(self, model: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.model = model
        self._head = [head]  # not a child of its own

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        seen: list[tuple[Tensor, Tensor]] = []

        def note(_head: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
            # Noise, since the head is all zeros: another function of zeros may be zero, too.
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
            seen.append((given[0], noise.to(output)))
            return seen[-1][1]

        hook = self._head[0].register_forward_hook(note)
        try:
            logits = family_of(self.model).logits(self.model(*args, **kwargs))
        finally:
            hook.remove()
        if len(seen) != 1 or seen[0][0].ndim != 2:
            raise UnsupportedError(
                f"fit_head needs a classifier that is called once, with one row to a sample: "
                f"{type(self.model).__name__} calls it {len(seen)} times"
                + (f", with {tuple(seen[0][0].shape)}" if seen else "")
            )
        features, made = seen[0]
        if not torch.equal(logits, made):
            raise UnsupportedError(
                f"the logits of {type(self.model).__name__} are not its classifier's output, so "
                "the classifier cannot be trained alone: use fit"
            )
        return features


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
        model: whose classifier is one linear layer that returns the logits: a timm or Hugging Face
            model, or one with a `tangent_ops.Family`. It is not changed.
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
        UnsupportedError: the classifier is not one linear layer, or does not return the logits.
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
    loader = cached_loader(PreLogits(model, head), loader, None, where, recipe, show)
    history = train(head, loader, group, recipe, progress)
    history.seconds = time.perf_counter() - start
    return model, history


def zero_head(model: Any, num_classes: int | None) -> nn.Linear:
    """Reset the model's classifier, if num_classes is given, and set it to zeros.

    Raises:
        ArgumentError: there is no classifier.
        UnsupportedError: the classifier is not one linear layer.
    """
    kind = type(model).__name__
    resets = callable(getattr(model, "reset_classifier", None))  # timm's
    if num_classes is not None and resets:
        model.reset_classifier(num_classes)
    found = heads_of(model)
    if len(found) > 1:
        names = [name.rpartition(".")[0] for name in names_of(model, found)]
        raise UnsupportedError(
            f"fit_head needs one nn.Linear as classifier, {kind} has {[*dict.fromkeys(names)]}: "
            "load it as a class with one (DeiTForImageClassification), or use fit"
        )
    if not found:
        present = model.get_classifier() if resets else getattr(model, "classifier", None)
        present = getattr(model, "head", None) if present is None else present
        if isinstance(present, nn.Identity):
            how = "pass num_classes" if resets else "load the model with num_labels"
            raise ArgumentError(f"model has no classifier: {how}")
        what = "no known classifier" if present is None else f"a {type(present).__name__}"
        raise UnsupportedError(
            f"fit_head needs one nn.Linear as classifier, {kind} has {what}: set "
            "model.tangent_family to a tangent_ops.Family (docs/models.md)"
        )
    head = found[0]
    if num_classes is not None and not resets:
        head = _replaced(model, head, num_classes)
    for parameter in head.parameters():
        nn.init.zeros_(parameter.requires_grad_())
    return head


def _replaced(model: Any, head: nn.Linear, num_classes: int) -> nn.Linear:
    """Put a linear layer of so many outputs in the place of the head."""
    name = next(name for name, module in model.named_modules() if module is head)
    like = {"device": head.weight.device, "dtype": head.weight.dtype}
    made = nn.Linear(head.in_features, num_classes, head.bias is not None, **like)
    made.train(head.training)
    model.set_submodule(name, made)
    if hasattr(getattr(model, "config", None), "num_labels"):  # Hugging Face's
        model.config.num_labels = model.num_labels = num_classes
    return made
