"""What a model in eval mode keeps of its weights from call to call, and must not keep here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn


def keepers(model: nn.Module) -> list[nn.Module]:
    """Modules that may keep something in eval mode: those that do more in ``train()`` than most.

    LeViT, say, gathers its attention biases once per device and forgets them in ``train()``.
    """
    return [module for module in model.modules() if type(module).train is not nn.Module.train]


def forget(modules: Sequence[nn.Module]) -> None:
    """Has each forget what it keeps; every mode stays as it is."""
    for module in modules:
        modes = [(each, each.training) for each in module.modules()]
        module.train(module.training)
        for each, mode in modes:
            each.training = mode


@contextlib.contextmanager
def nothing_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """A call that neither finds nor leaves anything.

    What an earlier call left has no tangent, or one of a level that is over: its derivative would
    be missing without a word.
    """
    forget(modules)
    try:
        yield
    finally:
        forget(modules)
