"""Part 5: accuracy against ε, for tangent and ordinary fine-tuning and a probe."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader

from studies.paper.cells import Cell, Found
from studies.paper.methods import LOSSES, Start, tangent
from studies.paper.parts.context import Context, score
from studies.paper.presets import Preset
from studies.paper.tokens import FEATURES
from tangent_ops import CachedFeatures, linearize
from tangent_ops.model.features import Tail
from tangent_ops.privacy import Privacy, fit_private
from tangent_ops.privacy.accounting import Phase, epsilon, noise_multiplier_for

PART = "privacy"
TUNED_ON = 0
LOSS = "square"
RATES = {"tangent": (3e-4, 1e-3), "ordinary": (3e-4, 1e-3), "probe": (1e-3, 4e-3)}
CLIP = 1.0
PHYSICAL_BATCH = 64
PROBE_STEPS = 60  # of the probe, whose steps are cheap
NOT_PRIVATE_EPOCHS = 4
NOT_PRIVATE_RATE = 6e-4


def plan(preset: Preset, found: Found) -> Iterator[Cell]:
    """For every ε and way each rate on the first seed, and the best of them on the others."""
    part = preset.privacy
    sizes = {"public": part.public, "private": part.private, "validation": part.validation}
    given = {"images": part.images, "failure": part.failure, **sizes}
    for seed in preset.seeds:
        yield Cell(PART, {**given, "way": "not private", "seed": seed})
    given |= {"expected": part.expected, "steps": part.steps}
    for epsilon_ in part.epsilons:
        for way, rates in RATES.items():
            asked = {**given, "way": way, "epsilon": epsilon_}
            for rate in rates:
                yield Cell(PART, {**asked, "seed": TUNED_ON, "rate": rate})
            best = chosen(found, **asked)
            if best is not None:
                for seed in preset.seeds:
                    yield Cell(PART, {**asked, "seed": seed, "rate": best["rate"]})


def chosen(found: Found, *, way: str, **given: Any) -> dict[str, Any] | None:
    """The run of the first seed that was best on public images; None if one is missing."""
    tried = found.of(PART, seed=TUNED_ON, way=way, **given)
    if len(tried) < len(RATES[way]):
        return None
    return max(tried, key=lambda cell: (cell["validation_accuracy"], -cell["rate"]))


def run(arguments: dict[str, Any], context: Context) -> dict[str, Any]:
    """Train one model with differential privacy, and score it."""
    prepared = context.prepared(arguments["images"])
    sizes = [arguments["public"], arguments["private"], arguments["validation"]]
    public, private, validation = prepared.drawn(arguments["seed"], sizes)
    anchor = context.anchor(arguments["images"], public, LOSS, arguments["seed"])
    depth = FEATURES if arguments["way"] == "probe" else 1
    data = prepared.rows(depth, private)
    began = time.perf_counter()
    found: dict[str, Any] = {}
    if arguments["way"] == "not private":
        start = Start(anchor, data, LOSS, arguments["seed"], NOT_PRIVATE_EPOCHS)
        model = tangent(start, NOT_PRIVATE_RATE)
        found["anchor_accuracy"] = score(anchor, prepared.tested(depth))
    elif arguments["way"] == "ordinary":
        model, found["spent"] = _ordinary(anchor, data, arguments)
    else:
        model, found["spent"] = _tangent(anchor, data, arguments)
    found["seconds"] = time.perf_counter() - began
    found["validation_accuracy"] = score(model, prepared.rows(depth, validation))
    found["test_accuracy"] = score(model, prepared.tested(depth))
    return found


def _tangent(
    anchor: Tail, data: CachedFeatures, arguments: dict[str, Any]
) -> tuple[nn.Module, float]:
    """The tail's deltas, or the classifier's alone; and the ε that was spent."""
    probe = arguments["way"] == "probe"
    model = linearize(anchor.get_submodule("head") if probe else anchor)
    fitted = fit_private(
        model,
        data,
        Privacy(
            delta=arguments["failure"],
            max_grad_norm=CLIP,
            target_epsilon=arguments["epsilon"],
            expected_batch_size=arguments["private"] / 2 if probe else arguments["expected"],
            steps=PROBE_STEPS if probe else arguments["steps"],
            seed=arguments["seed"],  # a study: to be repeated; no secret is kept
        ),
        loss=LOSSES[LOSS](),
        lr=arguments["rate"],
        physical_batch_size=1000 if probe else PHYSICAL_BATCH,
        progress=False,
    )
    return model, fitted.statement.epsilon


def _ordinary(
    anchor: Tail, data: CachedFeatures, arguments: dict[str, Any]
) -> tuple[nn.Module, float]:
    """The tail itself, by Opacus; and the ε that was spent."""
    rate, steps = arguments["expected"] / len(data), arguments["steps"]
    failure = arguments["failure"]
    sigma = noise_multiplier_for(arguments["epsilon"], failure, sample_rate=rate, steps=steps)
    torch.manual_seed(arguments["seed"])
    model = copy.deepcopy(anchor).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments["rate"], weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus': secure mode is off
        made: Any = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(data, arguments["expected"]),
            noise_multiplier=sigma,
            max_grad_norm=CLIP,
        )
        _run(*made, steps=steps)
    return model.eval(), epsilon([Phase(sigma, rate, steps)], failure)


def _run(module: nn.Module, optimizer: Any, loader: DataLoader, *, steps: int) -> None:
    done, loss = 0, LOSSES[LOSS]()
    while done < steps:
        memory = BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=PHYSICAL_BATCH, optimizer=optimizer
        )
        with memory as batches:
            for inputs, targets in batches:
                optimizer.zero_grad()
                device = next(module.parameters()).device
                loss(module(inputs.to(device)), targets.to(device)).backward()
                optimizer.step()
                done += not optimizer._is_last_step_skipped
                if done == steps:
                    return
