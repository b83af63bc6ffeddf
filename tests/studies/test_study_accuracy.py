"""The part on accuracy: its ways against other solvers, what chooses, and what is called best."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import studies  # noqa: F401  # makes the demo's modules importable
from studies.paper.cells import Cell, Found
from studies.paper.methods import HEAD, METHODS, OURS, THEIRS, LoRA, Start, exact, newton, with_head
from studies.paper.outcomes import logits_of, outcome
from studies.paper.parts import accuracy
from studies.paper.parts.accuracy import Regime, Sizes
from studies.paper.report.accuracy import Runs, regimes, section
from studies.paper.tokens import Prepared, class_token_tail
from tangent_ops import CachedFeatures
from tangent_ops.model.features import Tail

CLASSES, WIDTH = 3, 16


@pytest.fixture
def tail() -> Tail:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 28, "patch_size": 14, "embed_dim": WIDTH, "depth": 2}
    model = VisionTransformer(**sizes, num_heads=2, num_classes=0, global_pool="token").eval()
    return with_head(class_token_tail(model, 1, CLASSES), torch.nn.Linear(WIDTH, CLASSES))


@pytest.fixture
def data() -> CachedFeatures:
    return CachedFeatures(torch.randn(12, 5, WIDTH), torch.arange(12) % CLASSES)


def test_lora_is_pefts(tail: Tail) -> None:
    from peft import LoraConfig, get_peft_model

    ours = LoRA(with_head(tail, tail.get_submodule("head")))  # type: ignore[arg-type]
    layers = [name.removesuffix(".weight") for name in ours.names]
    assert len(layers) == 4
    theirs = with_head(tail, tail.get_submodule("head"))  # type: ignore[arg-type]
    get_peft_model(theirs, LoraConfig(r=8, lora_alpha=16, target_modules=layers))  # type: ignore
    with torch.no_grad():
        for name, down, up in zip(layers, ours.down, ours.up, strict=True):
            layer: Any = theirs.get_submodule(name)
            bound = 6**0.5 / down.shape[1] ** 0.5 / 6**0.5  # peft's: kaiming, a = 5 ** 0.5
            assert 0.8 * bound < float(down.abs().max()) <= bound
            assert not up.any() and not layer.lora_B["default"].weight.any()
            up.normal_()
            layer.lora_A["default"].weight.copy_(down)
            layer.lora_B["default"].weight.copy_(up)
        tokens = torch.randn(4, 5, WIDTH)
        assert not torch.allclose(ours(tokens), tail(tokens))
        torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-4, atol=1e-5)


def test_the_exact_fits_agree(tail: Tail, data: CachedFeatures) -> None:
    start = Start(tail, data, "square", 0, epochs=1)
    kernel, gradients = exact(start)(0.5), newton(start)(0.5)
    assert gradients.told["converged"]
    moved = logits_of(kernel.model, data) - logits_of(tail, data)
    assert float(moved.abs().max()) > 0.1
    # Newton-CG ends within a tenth of the deltas' norm.
    other = logits_of(gradients.model, data) - logits_of(kernel.model, data)
    assert float(other.norm()) < 0.1 * float(moved.norm())


def test_newton_ends_where_the_gradient_says(tail: Tail, data: CachedFeatures) -> None:
    l2 = 0.05
    fit = newton(Start(tail, data, "cross-entropy", 0, epochs=1))
    fit(2.0)  # the next one starts there
    found = fit(l2)
    model: Any = found.model
    deltas = model.deltas()
    # As `fit` has it: mean over the samples, plus l2 / 2 times the squared norm.
    loss = torch.nn.functional.cross_entropy(model(data.features), data.targets)
    gradients = torch.autograd.grad(loss, list(deltas.values()))
    pairs = zip(gradients, (delta.detach() for delta in deltas.values()), strict=True)
    rest = sum(float((g + l2 * d).square().sum()) for g, d in pairs) ** 0.5
    norm = sum(float(delta.detach().square().sum()) for delta in deltas.values()) ** 0.5
    assert found.told["converged"]
    assert rest / l2 / norm == pytest.approx(found.told["bound"], rel=0.05, abs=1e-4)
    assert rest / l2 / norm < 0.11


@dataclasses.dataclass(frozen=True)
class Bench:
    """A context of tokens at random: the classifier's tokens have the class in them."""

    prepared_: Prepared
    tail: Tail

    def prepared(self, images: str) -> Prepared:
        return self.prepared_

    def anchor(self, images: str, rows: Tensor, loss: str, seed: int, depth: int) -> Tail:
        return self.tail


def _bench(tail: Tail, test_targets: Tensor) -> Any:
    generator = torch.Generator().manual_seed(0)
    targets = torch.cat([test_targets, torch.arange(60) % CLASSES])
    tokens = torch.randn(len(targets), 5, WIDTH, generator=generator)
    tokens[:, 0, 0] += 2 * (torch.arange(len(targets)) % CLASSES)
    depths = {0: tokens[:, 0].numpy(), 1: tokens.numpy()}
    names = [str(index) for index in range(CLASSES)]
    prepared = Prepared("bench", depths, depths_of(depths, 30), targets, 30, names)
    return Bench(prepared, tail)


def depths_of(depths: dict[int, np.ndarray], count: int) -> dict[int, np.ndarray]:
    return {depth: values[:count] for depth, values in depths.items()}


SIZES = Sizes(
    ("bench",),
    (
        Regime(
            "few", 24, 18, 1, 8,
            square=("probe", "nlft-1", "taft-1-momentum", "taft-1-exact", "core"),
            entropy=("probe", "taft-1-newton"),
        ),
    ),
)  # fmt: skip


def _cells(bench: Any, seeds: tuple[int, ...] = (0, 1), costs: bool = True) -> Found:
    records = {}
    for cell in accuracy.plan(SIZES, seeds):
        if cell.arguments["loss"] == accuracy.COSTS and not costs:
            continue
        result = accuracy.run(dict(cell.arguments), bench)
        records[cell.name] = _record(cell, result)
    return Found(records)


def _record(cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    return {"part": cell.part, "arguments": cell.arguments, "result": result, "seconds": 1.0}


def test_test_images_choose_nothing_and_the_page_is_written(tail: Tail, tmp_path: Path) -> None:
    targets = torch.arange(30) % CLASSES
    found = _cells(_bench(tail, targets))
    (costs,) = found.of("accuracy", loss=accuracy.COSTS)
    assert all(cost["bytes"] > 0 for cost in costs["costs"].values())
    other = _cells(_bench(tail, targets.flip(0)), (0,), costs=False)
    first = [cell for cell in found.of("accuracy", seed=0) if "ways" in cell]
    for cell, same in zip(first, other.of("accuracy"), strict=True):
        assert cell["choices"] == same["choices"]
        assert set(cell["ways"]) == set(cell["methods"])
        for name, way in cell["ways"].items():
            assert way["validation"] == same["ways"][name]["validation"]
            assert way["test"]["images"] == way["shifted"]["images"] == 30
            tried = dict(cell["choices"][METHODS[name].title]["tried"])
            assert way["validation"] == max(tried.values())
    assert len(regimes(found)) == 1
    page = section(found, tmp_path)
    assert "| best of | bench | bench, shifted |" in page.text
    assert "Newton-CG converged in 2 of 2" in page.text
    assert page.figures[0][0].is_file()
    assert any("Reached" in line or "Missed" in line for line in page.findings)
    assert [claim.text.partition(": the")[0] for claim in page.claims] == [
        *("bench", "bench", "bench drawn by others"),
    ]


def test_the_best_of_a_family_is_the_best_on_validation_images() -> None:
    targets = torch.tensor([0, 1])

    def way(validation: float, said: list[int]) -> dict[str, Any]:
        logits = torch.nn.functional.one_hot(torch.tensor(said), 2).float()
        return {"validation": validation, "test": outcome(logits, targets)}

    square = [
        {"ways": {"nlft-1": way(0.5, [0, 0]), "taft-1": way(0.6, [0, 1])}},
        {"ways": {"nlft-1": way(0.7, [1, 0]), "taft-1": way(0.6, [0, 1])}},
    ]
    entropy = [
        {"ways": {"nlft-1": way(0.4, [0, 1])}},
        {"ways": {"nlft-1": way(0.7, [0, 1])}},
    ]
    runs = Runs({"square": square, "cross-entropy": entropy})
    # The second seed ties: the first of both is taken, though the other is right more often.
    assert runs.taken(THEIRS) == [("nlft-1", "square")] * 2
    assert runs.best(THEIRS).tolist() == [[1, 0], [0, 0]]
    assert runs.best(OURS).tolist() == [[1, 1], [1, 1]]
    assert runs.taken(HEAD) == []
    entropy[1]["ways"]["nlft-1"]["validation"] = 0.71
    assert runs.taken(THEIRS) == [("nlft-1", "square"), ("nlft-1", "cross-entropy")]
    assert runs.best(THEIRS).tolist() == [[1, 0], [1, 1]]
