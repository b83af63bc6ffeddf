"""Splits a vision transformer below its first trained block, and caches the lower part's output."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from tangent_ops.data import unpack
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.family import block_names
from tangent_ops.fields import Fields, Inputs, call
from tangent_ops.model.allocator import keep_memory
from tangent_ops.model.read_rows import agrees, count_read_rows, form_of, near, run_block
from tangent_ops.model.resumed import ResumedTail, check_arguments, differs_by_sample, taken_apart
from tangent_ops.ops.levels import alone


class Tail(nn.Module):
    """The part of a model from block ``start`` on: tokens in, what the model returns out.

    Its parameters are the model's own, under the model's own names. With class-token pooling the
    last block runs for the rows that are read alone (:mod:`tangent_ops.model.read_rows`).

    Args:
        model: a transformer with ``blocks``, ``norm`` and ``forward_head``, as in timm.
        start: index of the first block that belongs to the tail; ``len(model.blocks)`` leaves
            the final norm and the head.

    Attributes:
        rows: how many of the first rows of the last block's output are read; 0 stands for all.
    """

    norm: nn.Module

    def __init__(self, model: nn.Module, start: int):
        super().__init__()
        blocks = list(block_names(model).values())
        self.blocks = nn.ModuleDict({str(i): blocks[i] for i in range(start, len(blocks))})
        children = list(model.named_children())
        after = [name for name, _ in children].index("blocks") + 1
        for name, child in children[after:]:
            self.add_module(name, child)
        self._forward_head: Any = model.forward_head
        self.rows = count_read_rows(model) if self.blocks else 0
        self._form = form_of(blocks[-1]) if self.rows else None

    def forward(self, tokens: Tensor) -> Tensor:
        blocks = list(self.blocks.values())
        last = blocks.pop() if self.rows else None
        for block in blocks:
            tokens = block(tokens)
        if last is not None and self._form is not None:
            tokens = run_block(self._form, last, tokens, self.rows)
        return self._forward_head(self.norm(tokens))


class Trunk(nn.Module):
    """The part of a model below block ``start``: model inputs in, tokens out, no gradients.

    The first batch checks that the tail returns the model's output for the trunk's tokens. Inputs
    of several fields, and of indices, are checked in every batch: a model may read of them which
    tokens count.
    """

    def __init__(self, model: nn.Module, tail: Tail | ResumedTail, start: int):
        super().__init__()
        blocks = list(block_names(model).values())
        self.model = model
        # Not registered as children: the model already owns these modules.
        self._entry: list[Any] = [tail]
        if isinstance(tail, Tail):
            self._entry.append(blocks[start] if start < len(blocks) else tail.norm)
        else:
            self._entry.append(blocks[start - 1])
        self._checked = False

    @torch.no_grad()
    def forward(self, *args, **kwargs) -> Tensor:
        # The model temporarily has a hook and another mode.
        return alone(lambda: self._run(args, kwargs))

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        inputs = Fields(kwargs) if kwargs else args[0]
        try:
            if not self._checked or differs_by_sample(inputs):
                self._check(inputs)
                self._checked = True
            return self._tokens(inputs)
        finally:
            for module, mode in modes.items():  # the tail's modes may differ from the others
                module.training = mode

    def _tokens(self, inputs: Inputs) -> Tensor:
        return taken_apart(self._reached(inputs))[0]

    def _reached(self, inputs: Inputs) -> Any:
        """What enters the tail: its only argument, or the output of the block before it."""
        tail, module = self._entry

        def stop_before(_module, args, kwargs):
            raise _Reached(args, kwargs)

        def stop_after(_module, args, kwargs, output):
            check_arguments(args, kwargs)
            raise _Reached((output,), {})

        if isinstance(tail, Tail):
            handle = module.register_forward_pre_hook(stop_before, with_kwargs=True)
        else:
            handle = module.register_forward_hook(stop_after, with_kwargs=True)
        try:
            call(self.model, inputs)
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

    def _check(self, inputs: Inputs) -> None:
        tail = self._entry[0]
        expected = call(self.model, inputs)
        reached = self._reached(inputs)
        tokens = taken_apart(reached)[0]
        if isinstance(tail, ResumedTail) and not self._checked:
            tail.learn(inputs, reached)
        if isinstance(tail, Tail):
            by_rows = tail.rows and agrees(self.model, tail.rows)
            if not (by_rows and _gives(tail, tokens, expected)):
                tail.rows = 0  # the ordinary block is always right
        if not _gives(tail, tokens, expected):
            raise UnsupportedError(
                "this model cannot be split: its blocks, norm and head in a row do not give what "
                "the model gives. Train without a feature cache."
            )


class _Reached(Exception):
    """Control flow: the forward pass arrived at the first block of the tail."""

    def __init__(self, inputs: tuple, kwargs: dict):
        super().__init__()
        self.inputs = inputs
        self.kwargs = kwargs


def _gives(tail: nn.Module, tokens: Tensor, expected: Any) -> bool:
    """Whether the tail returns this output for the tokens, but for rounding."""
    try:
        found = tree_leaves(tail(tokens))
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
    ):  # it needs more than the tokens
        return False
    right = tree_leaves(expected)
    return len(found) == len(right) and all(
        near(one, other) for one, other in zip(found, right, strict=True) if other is not None
    )


def split_model(model: nn.Module, start: int) -> tuple[Trunk, Tail | ResumedTail]:
    """Split a transformer in front of block ``start``.

    ``tail(trunk(x))`` is ``model(x)``; no parameter is copied. The trunk runs in eval mode
    without gradients, so its tokens can be computed once (:func:`cache_features`).

    Args:
        model: has blocks (:class:`tangent_ops.Family`), one after the other.
        start: first block of the tail, from 0 to the number of blocks; of a model without timm's
            ``norm`` and ``forward_head`` at least 1.

    Raises:
        ArgumentError: ``start`` is out of range.
        UnsupportedError: the model has another structure (found here or at the first batch).
    """
    count = len(block_names(model))
    if not 0 <= start <= count:
        raise ArgumentError(f"start={start}: expected 0 to {count}, the number of blocks")
    if all(hasattr(model, name) for name in ("blocks", "norm", "forward_head")):
        tail = Tail(model, start)
        if hasattr(tail, "norm"):
            return Trunk(model, tail, start), tail
    if start == 0:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be split in front of its first block: no block is "
            "frozen. Train without a feature cache."
        )
    tail = ResumedTail(model, start)
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
        loader: yields (inputs, targets) batches, or dicts with "labels".
        path: None keeps the features in memory; a folder keeps them in a memory-mapped file
            ``features.bin`` there, for sets larger than memory. The file replaces an older one
            when it is complete; caches that are still mapped keep the older content.
        progress: show a progress bar.

    Raises:
        ArgumentError: the loader yields nothing, or something else than pairs of tensors of
            equal length, or features that change their shape or dtype.
    """
    device = next((tensor.device for tensor in trunk.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        keep_memory()
    store = _Memory() if path is None else _File(Path(path))
    targets: list[Tensor] = []
    expected: tuple[torch.Size, torch.dtype] | None = None
    try:
        for batch in tqdm(loader, desc="features", unit="batch", disable=not progress):
            inputs, labels = _pair(batch)
            features = call(trunk, inputs.to(device, non_blocking=True)).cpu()
            kind = (features.shape[1:], features.dtype)
            expected = expected or kind
            if len(features) != len(labels) or kind != expected:
                raise ArgumentError(
                    f"trunk gives {tuple(features.shape)} {features.dtype} for {len(labels)} "
                    f"targets, after rows of {tuple(expected[0])} {expected[1]}"
                )
            store.append(features)
            targets.append(labels)
        if not targets:
            raise ArgumentError("loader yields no batch, so there is nothing to cache")
        return CachedFeatures(store.finish(), torch.cat(targets))
    finally:
        store.close()


def _pair(batch: object) -> tuple[Inputs, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        labels = torch.as_tensor(batch[1])
        batch = (batch[0], labels)
    try:
        return unpack(batch, torch.device("cpu"))
    except ArgumentError as error:
        raise ArgumentError(
            "loader must yield (inputs, targets) batches, two tensors of equal length, or dicts "
            f"with labels; a dataset of single samples needs a DataLoader around it. {error}"
        ) from error


class _Memory:
    """Batches of rows, joined at the end."""

    def __init__(self):
        self.batches: list[Tensor] = []

    def append(self, features: Tensor) -> None:
        self.batches.append(features)

    def finish(self) -> Tensor:
        return torch.cat(self.batches)

    def close(self) -> None:
        self.batches.clear()


class _File:
    """Rows appended to a raw file under a temporary name, which is mapped, then renamed."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.target = folder / "features.bin"
        handle, self.name = tempfile.mkstemp(".partial", dir=folder)
        self.stream = os.fdopen(handle, "wb")
        self.rows = 0

    def append(self, features: Tensor) -> None:
        self.rows += len(features)
        self.shape, self.dtype = features.shape[1:], features.dtype
        # Bytes, because numpy has no bfloat16.
        self.stream.write(features.contiguous().view(-1).view(torch.uint8).numpy().data)

    def finish(self) -> Tensor:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        size = self.rows * self.shape.numel()
        # Not shared: torch gets a writable tensor, and writing to it never changes the file.
        mapped = torch.from_file(self.name, shared=False, size=size, dtype=self.dtype)
        os.replace(self.name, self.target)
        return mapped.view(self.rows, *self.shape)

    def close(self) -> None:
        self.stream.close()
        with contextlib.suppress(FileNotFoundError):  # it was renamed
            os.unlink(self.name)
