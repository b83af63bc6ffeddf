"""Split a vision transformer below its first trained block, and compute that part once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from tangent_ops.errors import ArgumentError, UnsupportedError


class Tail(nn.Module):
    """The part of a model from block ``start`` on: tokens in, what the model returns out.

    Its parameters are the model's own, under the model's own names.

    Args:
        model: a transformer with ``blocks``, ``norm`` and ``forward_head``, as in timm.
        start: index of the first block that belongs to the tail; ``len(model.blocks)`` leaves
            the final norm and the head.
    """

    def __init__(self, model: nn.Module, start: int):
        super().__init__()
        blocks = blocks_of(model)
        self.blocks = nn.ModuleDict({str(i): blocks[i] for i in range(start, len(blocks))})
        children = list(model.named_children())
        after = [name for name, _ in children].index("blocks") + 1
        for name, child in children[after:]:
            self.add_module(name, child)
        self._forward_head = model.forward_head

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks.values():
            tokens = block(tokens)
        return self._forward_head(self.norm(tokens))


class Trunk(nn.Module):
    """The part of a model below block ``start``: model inputs in, tokens out, no gradients.

    On its first batch it checks that the tail, fed with its tokens, gives what the model gives.
    """

    def __init__(self, model: nn.Module, tail: Tail, start: int):
        super().__init__()
        blocks = blocks_of(model)
        self.model = model
        # Not registered as a child: the model already owns these modules.
        self._entry = [blocks[start] if start < len(blocks) else model.norm]
        self._unchecked_tail = [tail]

    @torch.no_grad()
    def forward(self, *args) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        try:
            if self._unchecked_tail:
                self._check(self._unchecked_tail[0], args)
                self._unchecked_tail.clear()
            return self._tokens(args)
        finally:
            self.model.train(was_training)

    def _tokens(self, args) -> Tensor:
        def stop(_module, inputs, kwargs):
            raise _Reached(inputs, kwargs)

        handle = self._entry[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(*args)
        except _Reached as reached:
            if reached.kwargs or len(reached.inputs) != 1:
                raise UnsupportedError(
                    "this model cannot be split: its blocks take more than the tokens "
                    f"({len(reached.inputs)} positional and {list(reached.kwargs)} keyword "
                    "arguments). Train without a feature cache."
                ) from None
            return reached.inputs[0]
        finally:
            handle.remove()
        raise UnsupportedError("this model cannot be split: its forward pass skips its own blocks")

    def _check(self, tail: Tail, args) -> None:
        expected = self.model(*args)
        found = tail(self._tokens(args))
        same = (
            isinstance(expected, Tensor)
            and found.shape == expected.shape
            and torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        )
        if not same:
            raise UnsupportedError(
                "this model cannot be split: its blocks, norm and forward_head in a row do not "
                "give what the model gives. Train without a feature cache."
            )


class _Reached(Exception):
    """Control flow: the forward pass arrived at the first block of the tail."""

    def __init__(self, inputs: tuple, kwargs: dict):
        super().__init__()
        self.inputs = inputs
        self.kwargs = kwargs


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The model's transformer blocks.

    Raises:
        UnsupportedError: there is no ``blocks`` list, ``norm`` or ``forward_head``.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        raise UnsupportedError(
            f"{type(model).__name__} has no `blocks` (an nn.Sequential or nn.ModuleList), so it "
            "has no last blocks; name the trained parameters with a regular expression instead"
        )
    return blocks  # pyright: ignore[reportReturnType]


def split_model(model: nn.Module, start: int) -> tuple[Trunk, Tail]:
    """Split a timm-like transformer in front of block ``start``.

    ``tail(trunk(x))`` is ``model(x)``; no parameter is copied. The trunk runs in eval mode
    without gradients, so its tokens can be computed once (:func:`cache_features`).

    Args:
        model: has ``blocks``, ``norm`` and ``forward_head``.
        start: first block of the tail, from 0 to ``len(model.blocks)``.

    Raises:
        ArgumentError: ``start`` is out of range.
        UnsupportedError: the model has not this shape (some of it is found at the first batch).
    """
    count = len(blocks_of(model))
    if not 0 <= start <= count:
        raise ArgumentError(f"start={start}: expected 0 to {count}, the number of blocks")
    for needed in ("norm", "forward_head"):
        if not callable(getattr(model, needed, None)):
            raise UnsupportedError(
                f"{type(model).__name__} cannot be split: it has no `{needed}`. "
                "Train without a feature cache."
            )
    tail = Tail(model, start)
    return Trunk(model, tail, start), tail


class CachedFeatures(Dataset):
    """Tokens computed once, with their targets; indexes like any map-style dataset.

    Attributes:
        features: (samples, ...) tensor, in memory or mapped from a file.
        targets: (samples, ...) tensor.
    """

    def __init__(self, features: Tensor, targets: Tensor):
        if len(features) != len(targets):
            raise ArgumentError(f"{len(features)} features but {len(targets)} targets")
        self.features = features
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.features[index], self.targets[index]

    def subset(self, indices: Iterable[int]) -> Subset:
        """The samples at ``indices``, sharing this cache's memory."""
        return Subset(self, [int(index) for index in indices])


@torch.no_grad()
def cache_features(
    trunk: nn.Module,
    loader: Iterable,
    path: str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
) -> CachedFeatures:
    """Run ``trunk`` over a loader once and keep the results, in the loader's order.

    Valid only while the inputs stay the same: use it without augmentation, and pass a loader
    that does not shuffle.

    Args:
        trunk: module from a batch of inputs to a batch of features.
        loader: yields (inputs, targets) batches.
        path: None keeps the features in memory; a folder keeps them in a memory-mapped file
            ``features.npy`` there (float32), for sets larger than memory.
        progress: show a progress bar.

    Raises:
        ArgumentError: the loader yields nothing, or something else than pairs of tensors.
    """
    device = next((tensor.device for tensor in trunk.parameters()), torch.device("cpu"))
    features: list[Tensor] = []
    targets: list[Tensor] = []
    file = None if path is None else _FeatureFile(Path(path))
    for batch in tqdm(loader, desc="features", unit="batch", disable=not progress):
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ArgumentError("loader must yield (inputs, targets) pairs")
        inputs, labels = batch
        tokens = trunk(inputs.to(device, non_blocking=True)).cpu()
        if file is None:
            features.append(tokens)
        else:
            file.append(tokens)
        targets.append(torch.as_tensor(labels))
    if not targets:
        raise ArgumentError("loader yields no batch, so there is nothing to cache")
    kept = torch.cat(features) if file is None else file.finish()
    return CachedFeatures(kept, torch.cat(targets))


class _FeatureFile:
    """Rows appended to one raw file, then mapped; an unfinished file has another name."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.target = folder / "features.npy"
        self.partial = folder / "features.npy.partial"
        self.rows = 0
        self.shape: tuple[int, ...] = ()
        self.partial.write_bytes(b"")

    def append(self, tokens: Tensor) -> None:
        self.shape = tuple(tokens.shape[1:])
        self.rows += len(tokens)
        with self.partial.open("ab") as stream:
            stream.write(tokens.float().contiguous().numpy().tobytes())

    def finish(self) -> Tensor:
        os.replace(self.partial, self.target)
        shape = (self.rows, *self.shape)
        # Mode "c" (copy on write) gives torch a writable array without ever changing the file.
        return torch.from_numpy(np.memmap(self.target, np.float32, "c", shape=shape))
