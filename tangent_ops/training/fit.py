"""`fit`: train the deltas of a tangent model, or any module, by gradient descent."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Unpack

import torch
from torch import nn

from tangent_ops.data import Data, as_loader, place
from tangent_ops.errors import ArgumentError
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.training.loop import History, cached_loader, check_group, train
from tangent_ops.training.options import Recipe, RecipeOptions, recipe_of
from tangent_ops.training.processes import Group


def fit(
    model: nn.Module,
    data: Data,
    recipe: Recipe | None = None,
    *,
    device: str | torch.device | None = None,
    cache: bool | str | os.PathLike[str] = False,
    progress: bool = True,
    on_epoch: Callable[[History], None] | None = None,
    **options: Unpack[RecipeOptions],
) -> History:
    """Train a model's parameters in place; for a `LinearizedModel` these are its deltas.

    Minimises mean loss + l2/2 * (sum of the squared trainable parameters). For a tangent model and
    a convex loss this is the convex problem of Liu, Golatkar, Soatto: "Tangent Transformers for
    Composition, Privacy and Removal" (TAFT), ICLR 2024. The paper's code adds the norm itself, not
    its square: that penalty is not quadratic, so what is exact for quadratic problems (removal
    with a certificate, lossless composition) would not hold.

    Runs with the same seed on a CPU give the same parameters bit for bit. The states of torch's,
    numpy's, Python's and the loader's generators are restored. Train and eval modes stay as the
    caller set them; gradients of the trained parameters are cleared. On a CPU subnormal numbers are
    flushed to zero during the training (`tangent_ops.training.subnormals`).

    In a group of processes (`torch.distributed` is initialised, for example under torchrun) each
    one calls this with the same model, data and recipe, reads all batches and trains on its part.
    Trained parameters start as the first process has them, gradients are summed, and every process
    ends with the same parameters and history. They equal those of one process except for what a
    model in train mode draws (dropout), and for the order of sums: 2e-7 of the deltas' norm after
    60 steps of SGD in float32, on a small ViT and two CPU processes. With AdamW, parameters whose
    true gradient is zero move by rounding errors, too; the keys' biases do, which change no output.

    Args:
        model: a module of one input, or of the data's fields; parameters with requires_grad are
            trained. The loss gets its logits (`tangent_ops.Family`).
        data: a Dataset of (input, target), or of dicts with "labels" whose other fields are the
            model's keyword arguments, batched and shuffled here; or a DataLoader.
        recipe: how to train; None for `Recipe()`. `find_lr` suggests its learning rate.
        device: moves the model there first; None for where it is. Batches follow the model.
        cache: compute the outputs of the frozen blocks below the first trained one only once, in
            memory (True) or in a memory-mapped file in this folder; for a `LinearizedModel` and
            inputs without random augmentation. In a group every process computes all, and keeps
            its own file, in ``rank0``, ``rank1`` and so on of the folder.
        progress: show a progress bar; in a group the first process does.
        on_epoch: called after each epoch with the history so far, in every process of a group,
            while the model has that epoch's parameters: to measure an accuracy, say. What it draws
            at random does not change the training. An exception that it raises ends the fit.
        options: fields of the `Recipe`, which replace those of `recipe`.

    Returns:
        The losses and learning rates per epoch.

    Raises:
        ArgumentError: an argument out of range, or an unknown one; data that is empty or yields
            something else; no trainable parameters, or a loss that does not depend on them;
            processes of a group that differ in model, data or recipe.
        UnsupportedError: cache, for a model that cannot be split; float16, which needs a loss
            scaler; parts of batches (accumulate, a group) for a batch norm that normalises by
            them; in a group, a DistributedDataParallel, or trained parameters under FSDP.
        NonFiniteLossError: the loss or its gradient is NaN or infinite, in any process of a group;
            the parameters are as before that step.
    """
    start = time.perf_counter()
    recipe = recipe_of(fit, recipe, options)
    loader = as_loader(data, recipe.batch_size, shuffle=True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ArgumentError("model has no trainable parameters: all have requires_grad=False")
    if cache is not False and not isinstance(model, LinearizedModel):
        raise ArgumentError(
            f"cache needs a LinearizedModel, got a {type(model).__name__}: split an ordinary one "
            "with tangent_ops.model.features.split_model and fit its tail on cache_features"
        )
    where = place(model, device)
    group = Group(where)
    check_group(group, model, loader, recipe)
    if isinstance(model, LinearizedModel) and cache is not False:
        trunk, model = model.split()
        path = None if isinstance(cache, bool) else cache
        if path is not None and group.world > 1:
            path = os.path.join(path, f"rank{group.rank}")
        loader = cached_loader(trunk, loader, path, where, recipe, progress and group.rank == 0)
    history = train(model, loader, group, recipe, progress, on_epoch)
    history.seconds = time.perf_counter() - start
    return history
