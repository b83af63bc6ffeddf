"""Part 4: shards removed one after the other, what a request costs, and what an attacker sees."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from studies.paper.cells import Cell, Found
from studies.paper.methods import LOSSES, Start, ordinary
from studies.paper.parts import composition
from studies.paper.parts.context import Context, hits, logits_of, score
from studies.paper.parts.dealing import (
    LOSS,
    Dealt,
    batch_of,
    deal,
    fit_ordinary,
    fit_shards,
    joined,
    mean_logits,
)
from studies.paper.presets import Preset
from tangent_ops import CachedFeatures, Ledger, LinearizedModel, linearize
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.features import Tail

PART = "forgetting"
ATTACK = "membership"
ASCENT_EPOCHS, ASCENT_RATE = 2, 2e-5
REPAIR_EPOCHS = 1


def plan(preset: Preset, found: Found) -> Iterator[Cell]:
    """A curve and an attack to each seed, at the rates that composition chose for these shards."""
    part, composed = preset.forgetting, preset.composition
    given = {"images": part.images, "shards": part.shards, "public": composed.public}
    given |= {"train": composed.train, "validation": composed.validation}
    given |= {"epochs": composed.epochs}
    for way in ("tangent", "ordinary"):
        for shards, name in ((part.shards, f"{way}_rate"), (1, f"{way}_joint_rate")):
            asked = {"images": part.images, "deal": "iid", "shards": shards}
            best = composition.chosen(found, way=way, **asked)
            if best is None:
                return
            given[name] = best["rate"]
    for seed in preset.seeds:
        yield Cell(PART, {**given, "seed": seed, "removed": list(part.removed)})
        yield Cell(ATTACK, {**given, "seed": seed})


def run(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """Remove shards from a ledger, from an ensemble, and by training again on what is left."""
    dealt = deal(context, arguments)
    epochs, seed = arguments["epochs"], arguments["seed"]
    rate = arguments["ordinary_rate"]
    tangent = linearize(dealt.anchor)
    deltas = fit_shards(tangent, dealt.shards, arguments["tangent_rate"], epochs, seed)
    models = fit_ordinary(dealt.anchor, dealt.shards, rate, epochs, seed)
    logits = [logits_of(model, dealt.tested) for model in models]
    targets = dealt.tested.targets
    points = []
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger", anchor=tangent)
        for number, delta in enumerate(deltas):
            ledger.add(f"shard-{number}", delta)
        gone = 0
        for removed in arguments["removed"]:
            request = [0.0]
            while gone < removed:
                began = time.perf_counter()
                ledger.forget(f"shard-{gone}", progress=False)
                tangent.load_delta_dict(ledger.composed())
                request.append(time.perf_counter() - began)
                gone += 1
            tangent.load_delta_dict(ledger.composed())
            rest = joined(dealt.shards[removed:])
            again = {
                "tangent": _timed(lambda rest=rest: _tangent_again(dealt, rest, arguments)),
                "ordinary": _timed(lambda rest=rest: _ordinary_again(dealt, rest, arguments)),
            }
            points.append(
                {
                    "removed": removed,
                    "ledger": score(tangent, dealt.tested),
                    "ledger_seconds": request[-1],
                    "ensemble": hits(mean_logits(logits[removed:]), targets),
                    **{
                        f"{way}_again": score(model, dealt.tested)
                        for way, (model, _) in again.items()
                    },
                    **{f"{way}_again_seconds": seconds for way, (_, seconds) in again.items()},
                }
            )
        _, tangent_shard = _timed(
            lambda: fit_shards(tangent, dealt.shards[:1], arguments["tangent_rate"], epochs, seed)
        )
        _, ordinary_shard = _timed(
            lambda: fit_ordinary(dealt.anchor, dealt.shards[:1], rate, epochs, seed)
        )
    costs = {
        "tangent_shard_seconds": tangent_shard,
        "ordinary_shard_seconds": ordinary_shard,
        "tangent_step_flops": step_flops(tangent, dealt.shards[0]),
        "ordinary_step_flops": step_flops(models[0], dealt.shards[0]),
        "tangent_image_flops": forward_flops(tangent, dealt.shards[0]),
        "ordinary_image_flops": forward_flops(models[0], dealt.shards[0]),
        "delta_numbers": sum(value.numel() for value in deltas[0].values()),
        "anchor": score(dealt.anchor, dealt.tested),
    }
    return {"points": points, **costs}


def run_attack(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """Losses of the removed shard's images and of test images, by models before and after.

    The attacker has the anchor as well: an image's score is the loss by the anchor less the loss by
    the model, so that images that are easy for everyone do not look like members (Watson et al.,
    "On the Importance of Difficulty Calibration in Membership Inference Attacks", ICLR 2022).
    """
    dealt = deal(context, arguments)
    epochs, seed = arguments["epochs"], arguments["seed"]
    tangent = linearize(dealt.anchor)
    deltas = fit_shards(tangent, dealt.shards, arguments["tangent_rate"], epochs, seed)
    forgotten, rest = dealt.shards[0], joined(dealt.shards[1:])
    models: dict[str, Callable[[], nn.Module]] = {
        "tangent, one shard alone": lambda: _loaded(tangent, deltas[0]),
        "tangent mean, before": lambda: _by_ledger(tangent, deltas, forget=False),
        "tangent mean, forgotten by the ledger": lambda: _by_ledger(tangent, deltas, forget=True),
        "tangent mean, never had it": lambda: _by_ledger(tangent, deltas[1:], forget=False),
        "ordinary, before": lambda: _ordinary_again(dealt, dealt.private, arguments),
        "ordinary, trained again without it": lambda: _ordinary_again(dealt, rest, arguments),
    }
    anchor = {name: _losses(dealt.anchor, data) for name, data in _attacked(dealt)}
    scores: dict[str, Any] = {}

    def attack(name: str, model: nn.Module) -> None:
        found = {which: _losses(model, data) for which, data in _attacked(dealt)}
        gained = {which: anchor[which] - found[which] for which in found}
        scores[name] = {
            "members": [round(value, 4) for value in gained["members"].tolist()],
            "others": [round(value, 4) for value in gained["others"].tolist()],
            "test_accuracy": score(model, dealt.tested),
        }

    for name, make in models.items():
        model = make()
        attack(name, model)
        if name == "ordinary, before":
            before = {key: value.clone() for key, value in model.state_dict().items()}
            for way, approximate in (("ascent", _ascent), ("fine-tuning on the rest", _repair)):
                model.load_state_dict(before)
                approximate(model, forgotten, rest, arguments)
                attack(f"ordinary, {way}", model)
    return {"scores": scores}


def step_flops(model: nn.Module, data: CachedFeatures) -> float:
    """Floating-point operations of a training step, for each image."""
    inputs, targets = (part[:8].to(_device(model)) for part in (data.features, data.targets))
    with FlopCounterMode(display=False) as counter:
        LOSSES[LOSS]()(model(inputs), targets).backward()
    model.zero_grad()
    return counter.get_total_flops() / len(inputs)


def forward_flops(model: nn.Module, data: CachedFeatures) -> float:
    """Floating-point operations of a prediction, for each image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(data.features[:8].to(_device(model)))
    return counter.get_total_flops() / 8


def _tangent_again(dealt: Dealt, rest: CachedFeatures, arguments: dict[str, Any]) -> nn.Module:
    tangent = linearize(dealt.anchor)
    options = (arguments["tangent_joint_rate"], arguments["epochs"], arguments["seed"])
    fit_shards(tangent, [rest], *options)
    return tangent


def _ordinary_again(dealt: Dealt, rest: CachedFeatures, arguments: dict[str, Any]) -> nn.Module:
    epochs, seed = arguments["epochs"], arguments["seed"]
    start = Start(dealt.anchor, rest, LOSS, seed, epochs, batch_of(rest))
    return ordinary(start, arguments["ordinary_joint_rate"])


def _by_ledger(tangent: LinearizedModel, deltas: list[Any], *, forget: bool) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger", anchor=tangent)
        for number, delta in enumerate(deltas):
            ledger.add(f"shard-{number}", delta)
        if forget:
            ledger.forget("shard-0", progress=False)
        return _loaded(tangent, ledger.composed())


def _loaded(tangent: LinearizedModel, delta: Any) -> nn.Module:
    tangent.load_delta_dict(delta)
    return tangent


def _ascent(
    model: nn.Module, forgotten: CachedFeatures, rest: CachedFeatures, arguments: dict[str, Any]
) -> None:
    """Gradient ascent on what is to be forgotten."""
    loss = LOSSES[LOSS]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=ASCENT_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(arguments["seed"])
    for _ in range(ASCENT_EPOCHS):
        for batch in torch.randperm(len(forgotten), generator=generator).split(32):
            optimizer.zero_grad()
            inputs, targets = forgotten.features[batch], forgotten.targets[batch]
            device = _device(model)
            (-loss(model(inputs.to(device)), targets.to(device))).backward()
            optimizer.step()


def _repair(
    model: nn.Module, forgotten: CachedFeatures, rest: CachedFeatures, arguments: dict[str, Any]
) -> None:
    """Go on training without what is to be forgotten, and hope that it fades."""
    assert isinstance(model, Tail)
    start = Start(model, rest, LOSS, arguments["seed"], REPAIR_EPOCHS)
    start.fit(model, arguments["ordinary_joint_rate"])


def _attacked(dealt: Dealt) -> list[tuple[str, CachedFeatures]]:
    return [("members", dealt.shards[0]), ("others", dealt.tested)]


def _losses(model: nn.Module, data: CachedFeatures) -> Tensor:
    """Of each image, by the loss that models were trained with."""
    return RescaledSquareLoss(reduction="none")(logits_of(model, data), data.targets)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    found = call()
    return found, time.perf_counter() - began
