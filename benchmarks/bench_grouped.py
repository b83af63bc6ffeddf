"""Several small shards: trained in one group (`fit_grouped`) and one after the other (`fit`).

pytest benchmarks/bench_grouped.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

from tangent_ops import fit, fit_grouped, last_blocks, linearize

MODEL, PIXELS, CLASSES, SAMPLES = "vit_tiny_patch16_224", 96, 10, 4
OPTIONS: dict[str, Any] = {
    "epochs": 8,
    "batch_size": SAMPLES,
    "cache": True,
    "progress": False,
}  # 8 steps a shard


@pytest.mark.parametrize("way", ["grouped", "one by one"])
@pytest.mark.parametrize("count", [2, 8])
def test_fit(benchmark, count: int, way: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = timm.create_model(MODEL, img_size=PIXELS, num_classes=CLASSES).to(device)
    tangent = linearize(model, last_blocks(model, 1), check=False)
    shards = {
        f"customer-{k}": TensorDataset(
            torch.randn(SAMPLES, 3, PIXELS, PIXELS), torch.randint(CLASSES, (SAMPLES,))
        )
        for k in range(count)
    }

    def grouped() -> None:
        fit_grouped(tangent, shards, **OPTIONS)

    def one_by_one() -> None:
        for data in shards.values():
            fit(tangent, data, **OPTIONS)

    benchmark.group = f"fit {count} shards of {SAMPLES} images"
    call = grouped if way == "grouped" else one_by_one
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
