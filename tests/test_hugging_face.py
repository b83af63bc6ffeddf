"""Hugging Face's models, end to end: against jacobians of the models themselves in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hugging_face as hf
import pytest
import torch
from hugging_face import CLASSES, FAMILIES, PIXELS, Samples, inputs, made, samples
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from tangent_ops import (
    Influence,
    StatisticsLedger,
    accuracy,
    compose,
    core_basis,
    fit,
    fit_exact,
    fit_grouped,
    fit_head,
    last_blocks,
    linearize,
    load_delta,
    predict,
    save_delta,
    statistics,
)
from tangent_ops.errors import UnsupportedError
from tangent_ops.exact import Problem
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.export import export_program

# transformers keeps a layer that the classifier does not use, and the check says so.
pytestmark = pytest.mark.filterwarnings("ignore::tangent_ops.errors.NoGradientWarning")
TARGET = 15.0


@dataclass
class Case:
    """A family in float64: its tangent model, its data, and a dense problem beside them.

    Attributes:
        outputs: f, (N, C), of the model itself.
        jacobian: J, (N, C, P), of the model itself by the trained parameters.
        wanted: y, (N, C): 15 at the label.
    """

    family: str
    model: nn.Module
    names: list[str]
    data: Samples
    outputs: Tensor
    jacobian: Tensor
    wanted: Tensor

    def tangent(self) -> Any:
        return linearize(self.model, last_blocks(self.model, 1))

    def flat(self, delta: dict[str, Tensor]) -> Tensor:
        return torch.cat([delta[name].detach().flatten() for name in self.names])

    def optimum(self, l2: float, rows: list[int] | None = None) -> Tensor:
        """The fit's solution on all samples, or some of them."""
        chosen = list(range(len(self.data))) if rows is None else rows
        residual = (self.wanted - self.outputs)[chosen].flatten()
        return ridge(self.jacobian[chosen].flatten(0, 1), residual, l2)


def ridge(jacobian: Tensor, residual: Tensor, l2: float) -> Tensor:
    """argmin (1/m) ‖r - J Δ‖² + l2/2 ‖Δ‖², by its normal equations in the m outputs."""
    gram = jacobian @ jacobian.T + l2 * len(residual) / 2 * torch.eye(len(residual)).double()
    return jacobian.T @ torch.linalg.solve(gram, residual)


def in_double(data: Samples) -> Samples:
    fields = {n: x.double() if x.is_floating_point() else x for n, x in data.fields.items()}
    return Samples(fields)


def case(family: str, attention: str = "sdpa", count: int = 8) -> Case:
    model = made(family, attention).double()
    data = in_double(samples(family, count))
    fields = {name: value for name, value in data.fields.items() if name != "labels"}
    names = list(linearize(model, last_blocks(model, 1), check=False).deltas())
    weights = {name: model.get_parameter(name).detach() for name in names}

    leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
    outputs = functional_call(model, leaves, kwargs=fields).logits
    rows = []
    for output in outputs.flatten():
        of_output = torch.autograd.grad(
            output, [*leaves.values()], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([row.flatten() for row in of_output]))
    jacobian = torch.stack(rows).view(*outputs.shape, -1)
    wanted = TARGET * nn.functional.one_hot(data.fields["labels"], CLASSES).double()
    return Case(family, model, names, data, outputs.detach(), jacobian, wanted)


@pytest.fixture(scope="module", params=FAMILIES)
def each(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


def moved(tangent: Any, seed: int = 5) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in tangent.deltas().values():
            noise = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
            delta.copy_(0.05 * noise)
    return tangent


def test_the_tangent_model_returns_the_models_own_output(each: Case) -> None:
    tangent = moved(each.tangent())
    fields = {name: x for name, x in each.data.fields.items() if name != "labels"}
    output = tangent(**fields)
    assert type(output) is type(each.model(**fields))
    expected = each.outputs + each.jacobian @ each.flat(tangent.deltas())
    torch.testing.assert_close(output.logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output["logits"], output.logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["vit", "bert", "swin"])
def test_eager_attention(family: str) -> None:
    one = case(family, "eager", count=3)
    tangent = moved(one.tangent())
    fields = {name: x for name, x in one.data.fields.items() if name != "labels"}
    expected = one.outputs + one.jacobian @ one.flat(tangent.deltas())
    # Its softmax is in float32, whatever the model's dtype is.
    torch.testing.assert_close(tangent(**fields).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "dtype"), [("vit", torch.float32), ("clip", torch.float64), ("swin", torch.float32)]
)
def test_the_check_allows_for_softmax_in_float32(family: str, dtype: torch.dtype) -> None:
    """By keys' biases the gradient is zero but for that rounding, in float64, too."""
    linearize(made(family, "eager").to(dtype))


@pytest.mark.parametrize("repeated", [False, True])
def test_the_check_allows_for_it_in_small_gradients(repeated: bool) -> None:
    """Nearly equal values: all of the keys' gradients are as small as that rounding."""
    model = made("vit", "eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".v_proj." in name:
                parameter.mul_(1e-6) if parameter.ndim > 1 else parameter.fill_(1)
    tangent = linearize(model, last_blocks(model, 1))
    tangent.set_grad_checkpointing(repeated)
    tangent(**inputs("vit", 2))  # is checked


def test_last_blocks_are_the_last_block_and_what_follows(each: Case) -> None:
    blocks = {
        "bert": "bert.encoder.layer.2.",
        "clip": "vision_model.encoder.layers.2.",
        "deit": "deit.layers.2.",
        "deit-distilled": "deit.layers.2.",
        "dinov2": "dinov2.encoder.layer.2.",
        "roberta": "roberta.encoder.layer.2.",
        "siglip": "vision_model.encoder.layers.2.",
        "swin": "swin.encoder.layers.2.",
        "vit": "vit.layers.2.",
    }[each.family]
    names = [name for name, _ in each.model.named_parameters()]
    first = next(i for i, name in enumerate(names) if name.startswith(blocks))
    assert each.names == names[first:]
    assert any("classifier" in name for name in each.names)


def test_fit_is_descent_of_the_linear_model(each: Case) -> None:
    tangent = each.tangent()
    recipe = {"epochs": 4, "lr": 1e-3, "optimizer": "sgd", "schedule": "constant", "l2": 0.1}
    history = fit(tangent, each.data, batch_size=8, progress=False, **recipe)

    flat = torch.zeros(each.jacobian.shape[2], dtype=torch.float64)
    velocity, losses = torch.zeros_like(flat), []
    for _ in range(4):
        residual = each.outputs + each.jacobian @ flat - each.wanted
        losses.append(float(residual.square().mean() + 0.05 * flat.square().sum()))
        slope = 2 / residual.numel() * torch.einsum("nc,ncp->p", residual, each.jacobian)
        velocity = 0.9 * velocity + slope + 0.1 * flat
        flat = flat - 1e-3 * velocity
    assert history.loss == pytest.approx(losses, rel=1e-9)
    found = each.flat(tangent.deltas())
    assert float((found - flat).norm()) <= 1e-9 * float(flat.norm())


def test_fits_on_cached_features_are_the_same(each: Case) -> None:
    recipe = {"epochs": 2, "lr": 1e-3, "batch_size": 3, "progress": False}
    plain, cached = each.tangent(), each.tangent()
    history = fit(plain, each.data, **recipe)
    if each.family in PIXELS:
        assert fit(cached, each.data, cache=True, **recipe).loss == pytest.approx(history.loss)
        torch.testing.assert_close(each.flat(cached.deltas()), each.flat(plain.deltas()))
        return
    with pytest.raises(UnsupportedError, match=r"mask of padding\)\. Train without a feature ca"):
        fit(cached, each.data, cache=True, **recipe)


def test_exact_fits_and_influence(each: Case) -> None:
    tangent = each.tangent()
    problem = Problem(tangent, each.data, 0.1, progress=False, batch_size=5)
    fit_exact(problem, tol=1e-9)
    expected = each.optimum(0.1)
    assert float((each.flat(tangent.deltas()) - expected).norm()) < 1e-7 * float(expected.norm())

    fields = {name: x[:2] for name, x in each.data.fields.items() if name != "labels"}
    change = Influence(problem).change(fields)  # (N, M, C)
    without = each.optimum(0.1, rows=[0, 1, 2, 4, 5, 6, 7])
    moves = each.jacobian[:2] @ (without - expected)
    # The penalty of the refit is of N - 1 samples' mean loss, as documented.
    torch.testing.assert_close(change[3], moves, rtol=1e-5, atol=1e-6)


def test_accuracy_and_predictions(each: Case) -> None:
    labels = each.outputs.argmax(1).clone()
    labels[:3] = (labels[:3] + 1) % CLASSES
    data = Samples({**each.data.fields, "label": labels})
    del data.fields["labels"]
    assert accuracy(each.model, data, batch_size=3) == 5 / 8
    torch.testing.assert_close(predict(each.tangent(), each.data, batch_size=3), each.outputs)


def test_probes_are_linear_models_of_the_classifiers_inputs(each: Case) -> None:
    recipe = {"epochs": 3, "lr": 0.05, "batch_size": 8, "schedule": "constant"}
    if each.family == "deit-distilled":
        with pytest.raises(UnsupportedError, match="has \\['cls_classifier', 'distillation_class"):
            fit_head(each.model, each.data)
        return
    before = copy.deepcopy(each.model.state_dict())
    probe: Any
    probe, history = fit_head(each.model, each.data, num_classes=6, progress=False, **recipe)

    head = "classifier.out_proj" if each.family == "roberta" else "classifier"
    bare = copy.deepcopy(each.model)
    bare.set_submodule(head, nn.Identity())
    fields = {name: x for name, x in each.data.fields.items() if name != "labels"}
    with torch.no_grad():
        features = bare(**fields).logits
    linear = nn.Linear(features.shape[1], 6).double()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer, losses = torch.optim.AdamW(linear.parameters(), 0.05, weight_decay=0.0), []
    for _ in range(3):
        wanted = TARGET * nn.functional.one_hot(each.data.fields["labels"], 6).double()
        loss = (linear(features) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert history.loss == pytest.approx(losses)
    with torch.no_grad():
        torch.testing.assert_close(probe(**fields).logits, linear(features))
    assert probe.config.num_labels == 6
    for name, value in each.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_statistics_in_a_core_and_their_ledger(each: Case, tmp_path: Path) -> None:
    public = in_double(samples(each.family, 5, seed=40))
    basis = core_basis(each.model, public, (2, 3))
    tangent = linearize(each.model, core=basis)
    parts = [Samples({n: x[a:b] for n, x in each.data.fields.items()}) for a, b in ((0, 3), (3, 8))]
    ledger = StatisticsLedger(tmp_path / "ledger", anchor=tangent)
    for name, part in zip("ab", parts, strict=True):
        ledger.add(name, statistics(tangent, part, progress=False))
    both = ledger.solve(0.1)
    ledger.forget("a")
    rest = ledger.solve(0.1)
    for delta, rows in ((both, list(range(8))), (rest, [3, 4, 5, 6, 7])):
        jacobian = core_rows(each, basis, tangent, rows)
        residual = (each.wanted - each.outputs)[rows].flatten()
        expected = ridge(jacobian, residual, 0.1)
        found = torch.cat([delta[name].double().flatten() for name in tangent.deltas()])
        off = float((found - expected).norm())
        assert off < 1e-5 * float(expected.norm())  # terms are rounded to 2^-24


def core_rows(each: Case, basis: Any, tangent: Any, rows: list[int]) -> Tensor:
    """J by the cores and the parameters that are trained in full, by the chain rule."""
    split = {}
    for name, part in zip(
        each.names,
        each.jacobian[rows]
        .flatten(0, 1)
        .split([each.model.get_parameter(n).numel() for n in each.names], 1),
        strict=True,
    ):
        split[name] = part.unflatten(1, each.model.get_parameter(name).shape)
    found = []
    for name in tangent.deltas():
        part = split[name]
        if name in basis:
            left, right = (side.double() for side in basis[name])
            part = torch.einsum("noi,ob,ai->nba", part, left, right)
        found.append(part.flatten(1))
    return torch.cat(found, dim=1)


def test_deltas_are_files_and_compose(each: Case, tmp_path: Path) -> None:
    first, second = (moved(each.tangent(), seed).delta_dict() for seed in (1, 2))
    save_delta(first, tmp_path / "one.safetensors")
    tangent = each.tangent()
    mean = compose([load_delta(tmp_path / "one.safetensors"), second], how="mean")
    tangent.load_delta_dict(mean)
    expected = each.outputs + each.jacobian @ ((each.flat(first) + each.flat(second)) / 2)
    torch.testing.assert_close(predict(tangent, each.data), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of Swin's windows
def test_shards_that_are_trained_together(each: Case) -> None:
    recipe = {"epochs": 1, "lr": 1e-3, "batch_size": 4, "progress": False}
    parts = {
        name: Samples({n: x[a : a + 4] for n, x in each.data.fields.items()})
        for name, a in (("a", 0), ("b", 4))
    }
    if each.family not in PIXELS:  # transformers looks at the masks' values
        with pytest.raises(UnsupportedError, match="Fit one shard after the other"):
            fit_grouped(each.tangent(), parts, **recipe)
        return
    found = fit_grouped(each.tangent(), parts, **recipe)
    for name, part in parts.items():
        alone = each.tangent()
        fit(alone, part, **recipe)
        torch.testing.assert_close(each.flat(found[name]), each.flat(alone.deltas()))


def test_gradients_of_single_samples_for_private_training() -> None:
    pytest.importorskip("opacus")
    from tangent_ops.privacy.per_sample.gradients import per_sample_gradients

    one = case("vit", count=4)
    images, labels = one.data.fields["pixel_values"], one.data.fields["labels"]
    found = per_sample_gradients(one.tangent(), images, labels)
    residual = 2 / CLASSES * (one.outputs - one.wanted)
    expected = torch.einsum("nc,ncp->np", residual, one.jacobian)
    flat = torch.cat([found[name].flatten(1) for name in one.names], dim=1)
    torch.testing.assert_close(flat, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.long
@pytest.mark.parametrize("family", ["vit", "siglip", "swin"])
def test_exported_programs_return_the_logits(family: str, tmp_path: Path) -> None:
    model = made(family)
    tangent = moved(linearize(model, last_blocks(model, 1)))
    side = inputs(family)["pixel_values"].shape[-1]
    export_program(tangent, tmp_path / "model.pt2", input_size=(3, side, side))
    images = inputs(family, 3, seed=9)["pixel_values"]
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(images), tangent(images).logits, rtol=1e-4, atol=1e-4)


def test_batches_of_a_processor_and_of_pairs_are_the_same() -> None:
    """`BatchEncoding`, what Hugging Face's collators return, is no dict."""
    data, model = samples("bert", 6), made("bert")
    tangent = linearize(model, last_blocks(model, 1))

    def collate(items: list[dict[str, Tensor]]) -> Any:
        stacked = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        return hf.transformers.BatchEncoding(stacked)

    found = accuracy(tangent, DataLoader(data, 4, collate_fn=collate))
    logits = model(**{n: x for n, x in data.fields.items() if n != "labels"}).logits.detach()
    expected = float((logits.argmax(1) == data.fields["labels"]).double().mean())
    assert found == expected
    loss = RescaledSquareLoss()
    losses = fit(
        tangent, DataLoader(data, 6, collate_fn=collate), epochs=1, lr=1e-3, progress=False
    )
    assert losses.loss == pytest.approx([float(loss(logits, data.fields["labels"]))], rel=1e-5)
