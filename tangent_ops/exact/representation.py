"""Chooses how J is kept: passes through the model, layer factors, or explicit rows."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tangent_ops.data import check_choice
from tangent_ops.errors import ArgumentError, UnsupportedError
from tangent_ops.exact.extract import Extractor
from tangent_ops.exact.jacobian import Jacobian
from tangent_ops.exact.passes import Passes
from tangent_ops.exact.stored import Stored, StoredBatches, StoredJacobian
from tangent_ops.fields import Inputs, call
from tangent_ops.ops.levels import in_turn

REPRESENTATIONS = ("auto", "passes", "factors", "rows")
DTYPES = (None, torch.float16, torch.bfloat16, torch.float32)

PRODUCTS = 60  # with the Hessian, that a solve is expected to take
OF_A_PASS = 5  # forward passes that a product by passes costs, with its backward pass
IN_MEMORY = 2 << 30  # bytes of factors that "auto" keeps in memory
ON_DISK = 64 << 30  # and in a folder


@dataclass
class Representation:
    """J of a problem's samples. Problems that differ in l2 alone share it.

    Attributes:
        wanted: "auto", or what the user chose.
        folder: where factors are kept; None for memory.
        dtype: of kept factors; None for the deltas' own.
        kind: "passes", "factors" or "rows"; None until it is needed.
        anchor: fingerprint of the anchor of factors and rows.
        extractor: for factors and rows.
        batches: the samples' factors or rows, once computed.
    """

    wanted: str = "auto"
    folder: Path | None = None
    dtype: torch.dtype | None = None
    kind: str | None = None
    anchor: str | None = None
    extractor: Extractor | None = field(default=None, repr=False)
    batches: StoredBatches | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_choice("representation", self.wanted, REPRESENTATIONS)
        if self.dtype not in DTYPES:
            raise ArgumentError(
                f"factors_dtype must be float16, bfloat16, float32 or None, got {self.dtype}"
            )

    def choose(self, passes: Passes) -> str:
        """The kind: the cheapest by counted operations that fits into memory, unless given."""
        if self.kind is None:
            self.kind, why = self._chosen(passes)
            if passes.progress and self.wanted == "auto":
                tqdm.write(f"J of {passes.samples:,} samples as {why}", file=sys.stderr)
        return self.kind

    def system(self, passes: Passes) -> Passes:
        """The same objective with the chosen J, which the first call computes."""
        if self.choose(passes) == "passes":
            return passes
        if self.batches is None:
            self.batches = self._computed(passes)
        return passes.changed(jacobian=StoredJacobian(passes.layout), loader=self.batches)

    def present(self, inputs: Inputs) -> Any:
        """Inputs as the chosen J takes them."""
        return inputs if self.extractor is None else self.extractor(inputs)

    def take(self, indices: Sequence[int]) -> Representation:
        """Of some of the samples; nothing is computed again."""
        return replace(self, batches=None if self.batches is None else self.batches.take(indices))

    def joined(self, passes: Passes) -> Representation:
        """Of these samples, and others after them; only the others' J is computed, if any is."""
        if self.batches is None:
            return replace(self)
        more = self._computed(passes)
        return replace(self, batches=self.batches.joined(more.stored, more.targets))

    def _chosen(self, passes: Passes) -> tuple[str, str]:
        given, outputs = self.wanted, passes.outputs
        if given == "passes":
            return given, ""
        by_passes = PRODUCTS * OF_A_PASS
        making = 1 + 2 * outputs  # forward passes: one, and a backward pass for each output
        if given == "auto" and making >= by_passes:
            return "passes", f"passes: factors of {outputs:,} outputs cost as many backward passes"
        inputs, _ = next(iter(passes.batches()))
        assert isinstance(passes.jacobian, Jacobian)
        tangent = passes.jacobian.tangent
        extractor = Extractor(tangent, inputs, explicit=given == "rows")
        forward = flops(tangent.anchor, inputs[:1])
        size = passes.samples * extractor.bytes_per_sample
        work = making * forward + PRODUCTS * extractor.work_per_sample
        if given == "auto" and work >= by_passes * forward:
            return "passes", "passes: factors would cost more operations"
        if given == "auto" and size > (IN_MEMORY if self.folder is None else ON_DISK):
            return "passes", f"passes: factors would take {size / 1e9:,.1f} GB"
        try:
            extractor.check(inputs)
        except UnsupportedError as error:
            if given != "auto":
                raise
            return "passes", f"passes: {error}"
        self.extractor, self.anchor = extractor, tangent.fingerprint
        gain = OF_A_PASS * forward / extractor.work_per_sample
        kind = "factors" if given == "auto" else given
        return kind, f"layer factors: {size / 1e6:,.0f} MB, products {gain:,.0f}x cheaper"

    def _computed(self, passes: Passes) -> StoredBatches:
        assert self.extractor is not None
        kept: Kept | None = None
        bar = tqdm(
            total=passes.samples,
            desc="factors",
            unit="sample",
            delay=2,
            leave=False,
            disable=not passes.progress,
        )
        targets = []
        with bar:
            for inputs, labels in passes.batches():
                found = self.extractor(inputs)
                kept = kept or Kept(found, passes.samples, self.folder, self.dtype)
                kept.append(found)
                targets.append(labels)
                bar.update(len(labels))
        assert kept is not None
        return StoredBatches(kept.stored, torch.cat(targets), passes.layout.dtype)


class Kept:
    """Memory, or a mapped file without a name, that is filled batch by batch.

    Args:
        like: the first batch.
        samples: N of all.
        folder: of the file, which is gone when the last tensor of it is; None for memory.
        dtype: of the tensors; None for the batch's own.
    """

    def __init__(
        self, like: Stored, samples: int, folder: Path | None, dtype: torch.dtype | None
    ) -> None:
        self._folder, self._dtype, self._samples = folder, dtype, samples
        self._filled = 0
        parts = [
            part.changed(**{name: self._empty(tensor) for name, tensor in part.tensors.items()})
            for part in like.parts
        ]
        logits = like.logits.new_empty(samples, like.logits.shape[1])
        self.stored = Stored(logits, tuple(parts), like.shape)

    def append(self, batch: Stored) -> None:
        """Copy the next batch."""
        where = slice(self._filled, self._filled + len(batch))
        self.stored.logits[where] = batch.logits
        for part, others in zip(self.stored.parts, batch.parts, strict=True):
            for name, tensor in part.tensors.items():
                tensor[where] = others.tensors[name]
        self._filled += len(batch)

    def _empty(self, like: Tensor) -> Tensor:
        shape, dtype = (self._samples, *like.shape[1:]), self._dtype or like.dtype
        if self._folder is None:
            return like.new_empty(shape, dtype=dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".factors", dir=self._folder)
        size = torch.Size(shape).numel()
        try:  # a full disk is an error now, and not a crash when a page is written
            os.posix_fallocate(handle, 0, max(1, size * dtype.itemsize))
        except OSError:
            os.unlink(name)
            raise
        finally:
            os.close(handle)
        mapped = torch.from_file(name, shared=True, size=size, dtype=dtype)
        os.unlink(name)  # the mapping keeps the content
        return mapped.view(shape)


def flops(model: nn.Module, inputs: Inputs) -> int:
    """Floating-point operations of a forward pass."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        in_turn(lambda: call(model, inputs))
    return counter.get_total_flops()
