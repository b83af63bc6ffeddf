"""Training in the span of Jacobian rows, against the library's own training and fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import generator, shaken
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import Subset

import studies  # noqa: F401  # makes the demo's modules importable
from studies.paper.span import Span
from tangent_ops import CachedFeatures, fit, fit_exact, linearize, with_public
from tangent_ops.exact import Problem
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.features import Tail

N, C = 14, 3


@pytest.fixture(scope="module")
def tangent():
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=C
    )
    return linearize(Tail(shaken(model).double().eval(), 1))


@pytest.fixture(scope="module")
def data() -> CachedFeatures:
    tokens = torch.randn(N, 5, 8, generator=generator(), dtype=torch.float64)
    return CachedFeatures(tokens, torch.arange(N) % C)


@pytest.fixture(scope="module")
def span(tangent, data) -> Span:
    tangent.zero_()
    return Span(tangent, data)


@pytest.mark.parametrize("loss", [RescaledSquareLoss(), nn.CrossEntropyLoss()])
def test_descent_is_that_of_fit_with_momentum(tangent, data, span, loss) -> None:
    indices = torch.tensor([3, 0, 7, 12, 9, 1, 5])
    options: dict[str, Any] = {"lr": 3e-3, "epochs": 4, "seed": 5}
    tangent.zero_()
    part = Subset(data, indices.tolist())
    fit(tangent, part, loss=loss, optimizer="momentum", batch_size=3, progress=False, **options)
    expected = {name: value.clone() for name, value in tangent.delta_dict().items()}
    rates = [1e-3, options.pop("lr")]
    weights = span.descend(indices, loss, batch=3, lr=rates, **options)[1]
    alone = span.descend(indices, loss, batch=3, lr=rates[1], **options)
    torch.testing.assert_close(weights, alone)
    found = span.delta(weights)
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 1e-4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * scale)
    others = torch.ones(N, dtype=torch.bool).index_fill(0, indices, False)
    assert (weights[others] == 0).all() and (weights[indices] != 0).any()


def test_solutions_are_those_of_exact_fits(tangent, data, span) -> None:
    indices = torch.arange(2, 11)
    tangent.zero_()
    part = Subset(data, indices.tolist())
    fit_exact(Problem(tangent, part, 0.3, representation="passes", progress=False), 1e-8)
    expected = tangent.delta_dict()
    found = span.delta(span.solve(indices, 0.3))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)


def test_solutions_with_public_samples_are_those_of_exact_fits(tangent, data, span) -> None:
    indices, public = torch.tensor([3, 0, 7, 12]), torch.tensor([1, 2, 9, 10, 13])
    tangent.zero_()
    both = with_public(tangent, *(Subset(data, part.tolist()) for part in (indices, public)))
    loss = nn.MSELoss()
    fit_exact(Problem(tangent, both, 0.3, loss=loss, representation="passes", progress=False), 1e-8)
    expected = tangent.delta_dict()
    found = span.delta(span.solve(indices, 0.3, public))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)


def test_logits_are_the_models(tangent, data, span) -> None:
    weights = torch.randn(N, C, generator=generator(), dtype=torch.float64)
    tangent.load_delta_dict(span.delta(weights))
    with torch.no_grad():
        expected = tangent(data.features)
    torch.testing.assert_close(span.logits(weights), expected, rtol=1e-9, atol=1e-9)
    some = torch.tensor([5, 1])
    weights[4] = 0
    torch.testing.assert_close(span.logits(weights, some), span.logits(weights)[some])
