"""Training, optimizer included, on images in memory: epochs of ``fit``, and small shards.

Every call is an epoch of AdamW from the same start: Δw = 0, or w0. Answers are not compared here:
"train-step" has checked the gradients of the same ways to train, and the tests of `fit` its steps.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.bench_models import least_work, random_batch, random_vit, trained_parameters
from benchmarks.case import Case, clock_of
from tangent_ops import cache_features, fit, fit_grouped, last_blocks, linearize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cuda":  # products autocast to bfloat16, as `fit` does by default there
    CASE = Case("epoch", "vit_base_patch16_224", (1024, 64), "bf16")
else:
    CASE = Case("epoch", "vit_tiny_patch16_224", (8, 4), "fp32")
WAYS = {  # name of a provider: the question and the part that roofline counts
    "taft-1-cached": ("tangent", "tail"),  # on features computed before
    "taft-1-cached-first": ("tangent", "last"),  # the first epoch, which computes them
    "taft-1": ("tangent", "last"),
    "taft-all": ("tangent", "all"),
    "finetune": ("primal", "all"),
    "finetune-1": ("primal", "last"),
}


def trainee(name: str, case: Case, device: torch.device) -> tuple[Any, Any, dict[str, Any]]:
    """What the provider trains, on which data, and the parameters that it changes."""
    images, batch = case.shape
    torch.manual_seed(0)
    model = random_vit(case.op)
    data = DataLoader(TensorDataset(*random_batch(model, images)), batch)
    model = model.to(device)
    pattern = last_blocks(model, 1) if "-1" in name else ""
    if name.startswith("finetune"):
        ordinary = copy.deepcopy(model)
        return ordinary, data, trained_parameters(ordinary, pattern)
    tangent = linearize(model, pattern, check=False)
    if name != "taft-1-cached":
        return tangent, data, {**tangent.deltas()}
    trunk, tail = tangent.split()
    with torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bf16"):
        features = cache_features(trunk, data, progress=False)
    return tail, DataLoader(features, batch), {**tail.deltas()}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.benchmark(group=f"epoch {CASE}", timer=clock_of(DEVICE))
def test_epoch(name: str, benchmark) -> None:
    model, data, trained = trainee(name, CASE, DEVICE)
    start = {key: parameter.detach().clone() for key, parameter in trained.items()}
    options: Any = {"epochs": 1, "lr": 1e-3, "schedule": "constant", "amp": CASE.dtype == "bf16"}
    options |= {"cache": name == "taft-1-cached-first", "progress": False}

    @torch.no_grad()
    def restart() -> None:
        for key, parameter in trained.items():
            parameter.copy_(start[key])

    def epoch() -> None:
        fit(model, data, loss=F.cross_entropy, **options)

    question, part = WAYS[name]
    images, batch = CASE.shape
    step = least_work("step", question, CASE, torch.float32, batch, part)
    work = {"flops": images / batch * step.flops, "bytes": images / batch * step.bytes}
    benchmark.extra_info.update(case=vars(CASE), provider=name, **work)
    benchmark.pedantic(epoch, setup=restart, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("way", ["grouped", "one by one"])
@pytest.mark.parametrize("count", [2, 8])
def test_small_shards(count: int, way: str, benchmark) -> None:
    """8 steps of every shard, of 4 images: by `fit_grouped`, or one after another by `fit`."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=10).to(DEVICE)
    tangent = linearize(model, last_blocks(model, 1), check=False)
    shards = {
        f"customer-{k}": TensorDataset(torch.randn(4, 3, 96, 96), torch.randint(10, (4,)))
        for k in range(count)
    }
    options: Any = {"epochs": 8, "batch_size": 4, "cache": True, "progress": False}

    def grouped() -> None:
        fit_grouped(tangent, shards, **options)

    def one_by_one() -> None:
        for data in shards.values():
            fit(tangent, data, **options)

    benchmark.group = f"fit {count} shards of 4 images"
    benchmark.pedantic(grouped if way == "grouped" else one_by_one, rounds=3, warmup_rounds=1)
