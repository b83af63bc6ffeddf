"""Training within one shard: two processes, started once, against loops written by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import images, oracle, vit
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from two_processes import results

from tangent_ops import fit, fit_head, linearize, predict
from tangent_ops.delta import fingerprint
from tangent_ops.errors import ArgumentError, TangentOpsError
from tangent_ops.training.fsdp import fsdp_anchor

COUNT, SIZE = 11, 5  # batches of 5, 5 and 1: the second process has no part of the last
EPOCHS, LR, L2 = 2, 0.02, 0.1
MIXED = r"attn\.qkv|norm2|^head"  # every block has trained and frozen parameters
LATE = r"blocks\.2\.attn|^norm|^head"  # its first block is in part frozen
TRAINING = {"epochs": EPOCHS, "lr": LR, "l2": L2, "optimizer": "sgd", "progress": False}


def samples() -> TensorDataset:
    return TensorDataset(images(COUNT).double(), torch.arange(COUNT) % 5)


def loader() -> DataLoader:
    return DataLoader(samples(), SIZE)


def tangent(pattern: str = MIXED):
    return linearize(vit().double(), pattern)


def by_hand(pattern: str = MIXED) -> tuple[dict[str, Tensor], list[float]]:
    """Whole batches, SGD with momentum 0.9, cosine, in float64: no DataLoader, no optimizer."""
    model = vit().double()
    names = [*tangent(pattern).deltas()]
    weights = {name: model.get_parameter(name).detach() for name in names}
    deltas = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    speed = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    inputs, targets = samples().tensors
    starts = range(0, COUNT, SIZE)
    losses, step, steps = [], 0, EPOCHS * len(starts)
    for _ in range(EPOCHS):
        total = 0.0
        for start in starts:
            x, y = inputs[start : start + SIZE], targets[start : start + SIZE]
            moved = {name: delta.requires_grad_() for name, delta in deltas.items()}
            primal, shift = torch.func.jvp(oracle(model)(x), (weights,), (moved,))
            wanted = 15.0 * F.one_hot(y, 5)
            objective = (primal + shift - wanted).square().mean()
            objective = objective + L2 / 2 * sum(d.square().sum() for d in moved.values())
            gradients = torch.autograd.grad(objective, [*moved.values()])
            lr = LR / 2 * (1 + math.cos(math.pi * step / steps))
            for name, gradient in zip(names, gradients, strict=True):
                speed[name] = 0.9 * speed[name] + gradient
                deltas[name] = (deltas[name] - lr * speed[name]).detach()
            total += objective.item() * len(x)
            step += 1
        losses.append(total / COUNT)
    return deltas, losses


class Sometimes(nn.Module):
    """Its second layer is reached in every other step: in between, momentum must not move it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(768, 5).double() for _ in range(2))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits = self.layers[0](x.flatten(1))
        return logits + self.layers[1](x.flatten(1)) if self.calls % 2 else logits


class Drops(nn.Module):
    """Records what dropout made of ones in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(768, 5)).double()
        self.drawn: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(F.dropout(torch.ones(8)))
        return self.layers(x)


# What the two processes do


def fitted(model, data=None, **options) -> tuple[dict[str, Tensor], list[float]]:
    history = fit(model, loader() if data is None else data, **{**TRAINING, **options})
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, (
        history.loss
    )


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except TangentOpsError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def private_refusal(model: nn.Module) -> str:
    try:
        from tangent_ops.privacy import Privacy, fit_private
    except ImportError as error:  # its extra is not installed, and the test of it is skipped
        return str(error)
    privacy = Privacy(delta=0.01, max_grad_norm=1.0, noise_multiplier=1.0)
    return refusal(lambda: fit_private(model, samples(), privacy))


def scattered(model: nn.Module, rank: int) -> nn.Module:
    """Moves trained parameters by the rank; the group must make them equal again."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(rank)
    return model


def fits(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"plain": fitted(scattered(tangent(), rank))}
    found["accumulate"] = fitted(tangent(), accumulate=3)
    model = tangent()
    model.set_grad_checkpointing()
    found["checkpointing"] = fitted(model, accumulate=2)
    found["late"] = fitted(tangent(LATE))
    found["cached"] = fitted(tangent(LATE), cache=folder)
    found["shuffled"] = fitted(tangent(), samples(), batch_size=SIZE, seed=3)
    probe, history = fit_head(vit().double(), samples(), batch_size=SIZE, epochs=2, progress=False)
    found["head"] = dict(probe.named_parameters()), history.loss
    found["sometimes"] = fitted(Sometimes(), l2=0.0)
    drops = Drops()
    found["dropout"] = fitted(drops, samples(), batch_size=SIZE)
    found["drawn"] = torch.stack(drops.drawn)
    return found


def under_fsdp(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, checkpointing in (("fsdp", False), ("fsdp, checkpointing", True)):
        model = tangent()
        whole = sum(p.numel() for p in model.anchor.get_submodule("blocks").parameters())
        fsdp_anchor(model)
        model.set_grad_checkpointing(checkpointing)
        found[name] = fitted(model, accumulate=2 if checkpointing else 1)
        local = sum(
            p.to_local().numel() if isinstance(p, DTensor) else p.numel()
            for p in model.anchor.get_submodule("blocks").parameters()
        )
        found[f"{name}: elements"] = (whole, local)
    found["fsdp: predict"] = predict(model, samples(), batch_size=4, progress=False)
    meta = model.delta_dict().meta
    found["fsdp: delta"] = meta and meta.anchor
    for call, name in ((lambda: fsdp_anchor(model), "twice"), (model.float, "cast")):
        found[f"refused: fsdp {name}"] = refusal(call)
    found["refused: private"] = private_refusal(model)
    few = {f"delta.{name}": delta.detach() for name, delta in model.deltas().items()}
    x = images(1).double()
    found["refused: transform"] = refusal(
        lambda: torch.func.vjp(lambda d: torch.func.functional_call(model, d, x), few)
    )
    found["refused: input"] = refusal(lambda: model(x.requires_grad_()))
    found["refused: nothing frozen"] = refusal(lambda: fsdp_anchor(tangent("")))
    model = tangent(LATE)
    fsdp_anchor(model)
    found["fsdp, cached"] = fitted(model, cache=True)
    return found


def own_loop(rank: int, checkpointing: bool) -> dict[str, Tensor]:
    """One epoch with DistributedDataParallel, as users write it."""
    model = tangent()
    model.set_grad_checkpointing(checkpointing)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.deltas().values(), lr=LR)
    inputs, targets = samples().tensors
    for start in (0, 4):
        part = slice(start + 2 * rank, start + 2 * rank + 2)
        optimizer.zero_grad()
        F.cross_entropy(parallel(inputs[part]), targets[part]).backward()
        optimizer.step()
    return {name: delta.detach() for name, delta in model.deltas().items()}


def refusals(rank: int) -> dict[str, str]:
    data = samples()
    broken = TensorDataset(data.tensors[0].clone(), data.tensors[1])
    broken.tensors[0][8] = float("nan")  # the second batch is 5 to 9: the second process has 8
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 5)).double()
    quiet = {**TRAINING, "epochs": 1}
    found = {"not finite": refusal(lambda: fit(model, DataLoader(broken, SIZE), **quiet))}
    apart = DataLoader(data, SIZE, sampler=DistributedSampler(data))
    found["sampler"] = refusal(lambda: fit(model, apart, **quiet))
    swapped = [rank, 1 - rank, *range(2, COUNT)]
    order = DataLoader(data, SIZE, sampler=swapped)
    found["order"] = refusal(lambda: fit(model, order, **quiet))
    found["length"] = refusal(lambda: fit(model, DataLoader(data, SIZE + rank), **quiet))
    found["options"] = refusal(lambda: fit(model, data, **{**quiet, "lr": 1 + rank, "seed": rank}))
    other = vit().double()
    with torch.no_grad():
        other.get_parameter("pos_embed").add_(rank)
    found["anchor"] = refusal(lambda: fit(linearize(other, MIXED), data, **quiet))
    other.requires_grad_(False)
    other.get_parameter("head.bias").requires_grad_()
    found["fsdp apart"] = refusal(lambda: fsdp_anchor(linearize(other, MIXED)))
    found["probe"] = refusal(lambda: fit_head(other, data, progress=False))
    found["frozen"] = refusal(lambda: fit(other, data, **quiet))
    parallel = DistributedDataParallel(model)
    found["parallel"] = refusal(lambda: fit(parallel, data, **quiet))
    norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768), nn.Linear(768, 5)).double()
    found["batch norm"] = refusal(lambda: fit(norm, data, **quiet))
    return {f"refused: {name}": words for name, words in found.items()}


def work(rank: int, folder: Path) -> dict[str, Any]:
    found = fits(rank, folder / "cache") | under_fsdp(folder)
    found |= {"own loop": own_loop(rank, False), "own loop, checkpointing": own_loop(rank, True)}
    return found | refusals(rank)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("group")
    found = results("test_fit_parallel", folder)
    found[0]["files"] = sorted(str(f.relative_to(folder)) for f in folder.rglob("*.bin"))
    return found


def assert_near(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """float64 rounds at 1e-16; sums in another order, over thousands of terms, at 1e-13."""
    assert found.keys() == right.keys()
    for name, value in right.items():
        largest = float(value.detach().abs().max())
        assert largest > 1e-6, name
        assert float((found[name] - value).detach().abs().max()) <= 1e-12 * largest, name


FITS = {
    "plain": MIXED,
    "accumulate": MIXED,
    "checkpointing": MIXED,
    "fsdp": MIXED,
    "fsdp, checkpointing": MIXED,
    "late": LATE,
    "cached": LATE,
    "fsdp, cached": LATE,
}


@pytest.fixture(scope="module")
def right() -> dict[str, tuple[dict[str, Tensor], list[float]]]:
    return {pattern: by_hand(pattern) for pattern in (MIXED, LATE)}


@pytest.mark.parametrize(("name", "pattern"), FITS.items())
def test_processes_of_a_group_train_what_one_would(name, pattern, both, right):
    deltas, losses = right[pattern]
    for found, history in (process[name] for process in both):
        assert_near({key.removeprefix("delta."): value for key, value in found.items()}, deltas)
        assert history == pytest.approx(losses, rel=1e-12)


def test_every_process_ends_with_the_same_bits(both):
    for name in (*FITS, "shuffled", "head", "sometimes", "dropout"):
        (one, loss), (other, other_loss) = (process[name] for process in both)
        assert loss == other_loss
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_the_order_of_the_samples_is_one_processs(both):
    deltas, losses = fitted(tangent(), samples(), batch_size=SIZE, seed=3)
    found, history = both[0]["shuffled"]
    assert_near(found, deltas)
    assert history == pytest.approx(losses, rel=1e-12)


def test_a_parameter_without_gradient_stays(both):
    assert_near(both[0]["sometimes"][0], fitted(Sometimes(), l2=0.0)[0])


def test_processes_draw_apart(both):
    """The dropout of one process does not repeat that of the other."""
    one, other = (process["drawn"] for process in both)
    assert len({tuple(row.tolist()) for row in torch.cat([one, other])}) > 0.8 * 2 * len(one)


def test_a_probe_in_a_group(both):
    probe, history = fit_head(vit().double(), samples(), batch_size=SIZE, epochs=2, progress=False)
    found, losses = both[0]["head"]
    assert_near(found, dict(probe.named_parameters()))
    assert losses == pytest.approx(history.loss, rel=1e-12)


def test_each_process_has_its_own_file_of_features(both):
    assert both[0]["files"] == ["cache/rank0/features.bin", "cache/rank1/features.bin"]


@pytest.mark.parametrize("name", ["own loop", "own loop, checkpointing"])
def test_a_loop_of_ones_own_with_ddp(name, both):
    model, parameters = oracle(vit()), tangent().deltas()
    weights = {n: vit().double().get_parameter(n).detach() for n in parameters}
    deltas = {n: torch.zeros_like(weight) for n, weight in weights.items()}
    inputs, targets = samples().tensors
    for start in (0, 4):
        moved = {n: delta.requires_grad_() for n, delta in deltas.items()}
        batch = slice(start, start + 4)
        primal, shift = torch.func.jvp(model(inputs[batch]), (weights,), (moved,))
        loss = F.cross_entropy(primal + shift, targets[batch])
        gradients = torch.autograd.grad(loss, [*moved.values()])
        deltas = {n: (deltas[n] - LR * g).detach() for n, g in zip(moved, gradients, strict=True)}
    for process in both:
        assert_near(process[name], deltas)


# An anchor under FSDP


@pytest.mark.parametrize("name", ["fsdp", "fsdp, checkpointing"])
def test_each_process_keeps_half_of_what_is_frozen(name, both):
    blocks = vit().get_submodule("blocks").named_parameters(prefix="blocks")
    sizes = {n: p.numel() for n, p in blocks}
    own = sum(size for n, size in sizes.items() if "attn.qkv" in n or "norm2" in n)
    locals_ = [process[f"{name}: elements"][1] for process in both]
    assert sum(locals_) == sum(sizes.values()) + own  # trained ones are in both
    assert max(locals_) - min(locals_) == 0  # first dimensions are even


def test_an_anchor_under_fsdp_is_still_the_same_model(both):
    deltas = {n.removeprefix("delta."): d for n, d in both[0]["fsdp, checkpointing"][0].items()}
    weights = {n: vit().double().get_parameter(n).detach() for n in deltas}
    x = samples().tensors[0]
    primal, shift = torch.func.jvp(oracle(vit())(x), (weights,), (deltas,))
    for process in both:
        assert torch.allclose(process["fsdp: predict"], primal + shift, rtol=0, atol=1e-11)
        assert process["fsdp: delta"] == fingerprint(vit().double().state_dict())


# What is refused, by both processes


REFUSED = {
    "not finite": r"NonFiniteLossError: .* epoch 1 of 1, step 2 of 3",
    "sampler": r"ArgumentError: .*different (batches|data).*",
    "order": r"ArgumentError: the processes of the group read different batches.*same order",
    "length": r"ArgumentError: .* given different data",
    "options": r"ArgumentError: .* given different lr, seed:",
    "anchor": r"ArgumentError: .* given different model:",
    "fsdp apart": r"ArgumentError: .* given different tangent:",
    "probe": r"ArgumentError: .* given different model:",
    "frozen": r"ArgumentError: .* given different model:",
    "parallel": r"UnsupportedError: .*pass model\.module",
    "batch norm": r"UnsupportedError: 1 is a batch norm that normalises by the batch",
    "fsdp twice": r"UnsupportedError: the anchor is under FSDP already",
    "fsdp cast": r"UnsupportedError: the anchor is under FSDP, and stays as it is",
    "private": r"UnsupportedError: the anchor is under FSDP, and every process",
    "transform": r"UnsupportedError: torch\.compile, or a transform",
    "input": r"UnsupportedError: a derivative by the input",
    "nothing frozen": r"UnsupportedError: .* no frozen parameter in a block",
}


@pytest.mark.parametrize(("name", "message"), REFUSED.items())
def test_refuses_in_a_group(name, message, both):
    if name == "private":
        pytest.importorskip("tangent_ops.privacy", exc_type=ImportError)
    for process in both:
        assert re.match(message, process[f"refused: {name}"]), process[f"refused: {name}"]


def test_fsdp_needs_a_group_and_a_tangent_model():
    with pytest.raises(ArgumentError, match="no group of processes"):
        fsdp_anchor(tangent())
    with pytest.raises(ArgumentError, match="must be a LinearizedModel, got a VisionTransformer"):
        fsdp_anchor(vit())
