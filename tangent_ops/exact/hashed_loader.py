"""Reads data, and keeps the SHA-256 of each sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from tangent_ops.data import unpack
from tangent_ops.fields import named_tensors
from tangent_ops.files import add_tensor


class HashedLoader:
    """The batches of a loader; reading them keeps the SHA-256 of each sample."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.batch_size = loader.batch_size
        self.digests: list[bytes] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            # Sample by sample, so that the batch size does not matter.
            for one, target in zip(*unpack(batch, torch.device("cpu")), strict=True):
                digest = hashlib.sha256()
                for name, tensor in sorted(named_tensors(one).items()):
                    digest.update(name.encode())
                    add_tensor(digest, tensor)
                add_tensor(digest, target)
                self.digests.append(digest.digest())
            yield batch


def sha256_of(digests: Sequence[bytes]) -> str:
    """One SHA-256 of all samples, in their order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()
