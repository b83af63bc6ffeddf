"""The hashes of a problem's samples: of every field, its name and the target, one by one."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, Dataset

from tangent_ops.exact.hashed_loader import HashedLoader, sha256_of


class Dicts(Dataset):
    def __init__(self, first: str = "a", second: str = "b", target: int = 0) -> None:
        self.names, self.target = (first, second), target

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict:
        fields = {name: torch.tensor([k, index]) for k, name in enumerate(self.names)}
        return {**fields, "labels": self.target}


def hashed(data: Dataset, batch_size: int = 2) -> str:
    loader = HashedLoader(DataLoader(data, batch_size))
    assert len(list(loader)) == len(loader)
    return sha256_of(loader.digests)


def test_batches_do_not_matter_and_all_else_does() -> None:
    right = hashed(Dicts())
    assert hashed(Dicts(), 5) == right
    others = [Dicts("b", "a"), Dicts("a", "c"), Dicts(target=1)]
    assert len({right, *map(hashed, others)}) == 4
