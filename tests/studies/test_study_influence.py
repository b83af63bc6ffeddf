"""The study's influence part against dense Jacobians, least squares and PyTorch's gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from studies.paper.outcomes import right
from studies.paper.parts.influence import Judges, Refits, Sizes, judges, mislabelled, plan, run
from tangent_ops import CachedFeatures, Influence, linearize
from tangent_ops.exact import Problem
from tangent_ops.exact.tangent_kernel import TangentKernel
from tangent_ops.losses import RescaledSquareLoss

WIDTH, CLASSES, N, M = 6, 3, 12, 9
L2 = 0.3


def _model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    return nn.Sequential(*layers).to(dtype).eval()


def _data(count: int, seed: int) -> CachedFeatures:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return CachedFeatures(features, torch.randint(CLASSES, (count,), generator=generator))


def _jacobian(model: nn.Module, inputs: Tensor) -> Tensor:
    """(N, C, P)."""
    parameters = dict(model.named_parameters())
    found = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (inputs,)))(parameters)
    return torch.cat([found[name].flatten(2) for name in parameters], dim=2).detach()


@pytest.fixture(scope="module")
def case() -> SimpleNamespace:
    model, train, judged = _model(), _data(N, 1), _data(M, 2)
    problem = Problem(linearize(model), train, L2, representation="factors", progress=False)
    kernel = TangentKernel(problem.system)
    own = Judges(kernel.anchor_logits, kernel.gram.view(N, CLASSES, -1), train.targets)
    refits = Refits(kernel.gram, own.aims - own.anchored)
    across = judges(kernel, problem, judged)
    return SimpleNamespace(
        model=model, train=train, judged=judged, problem=problem, refits=refits, across=across
    )


@pytest.mark.parametrize("l2", [L2, 1e-4])
def test_a_refit_is_least_squares_on_the_images_that_are_kept(
    case: SimpleNamespace, l2: float
) -> None:
    kept = torch.tensor([0, 2, 3, 7, 11])
    inputs, targets = case.train.features[kept], case.train.targets[kept]
    jacobian = _jacobian(case.model, inputs).flatten(0, 1)
    logits = case.model(inputs).detach()
    aims = RescaledSquareLoss().M * torch.eye(CLASSES, dtype=torch.float64)[targets]
    # (1/n) Σ (1/C) ‖f - y‖² + (l2/2) ‖Δ‖², as rows of one least-squares problem
    scale = (len(kept) * CLASSES) ** -0.5
    penalty = (l2 / 2) ** 0.5 * torch.eye(jacobian.shape[1], dtype=torch.float64)
    wanted = torch.cat([scale * (aims - logits).flatten(), torch.zeros(len(penalty)).double()])
    delta = torch.linalg.lstsq(torch.cat([scale * jacobian, penalty]), wanted[:, None]).solution
    judged = case.judged.features
    expected = case.model(judged).detach() + (_jacobian(case.model, judged) @ delta).squeeze(2)

    found = case.across.logits(case.refits.fit(kept, l2))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_classical_harm_is_the_gradient_along_the_librarys_classical_change(
    case: SimpleNamespace,
) -> None:
    weights = case.refits.fit(torch.arange(N), L2)
    logits = case.across.logits(weights).requires_grad_()
    (gradient,) = torch.autograd.grad(RescaledSquareLoss()(logits, case.judged.targets), logits)
    changes = Influence(case.problem).classical(case.judged.features)
    expected = -(changes * gradient).sum(dim=(1, 2))
    found = case.refits.classical_harm(weights, case.across, L2)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_as_many_classes_as_asked_are_wrong_and_no_other_changes() -> None:
    targets = _data(40, 3).targets
    moved, wrong = mislabelled(targets, CLASSES, 0.25, torch.Generator().manual_seed(0))
    assert int(wrong.sum()) == 10
    assert torch.equal(moved != targets, wrong)
    assert moved.min() >= 0
    assert moved.max() < CLASSES


class _Prepared:
    """30 images to test, then 60 to draw from."""

    classes = ("a", "b", "c")

    def __init__(self) -> None:
        data = _data(90, 4)
        self.features, self.targets = data.features.float(), data.targets

    def drawn(self, seed: int, sizes: list[int]) -> list[Tensor]:
        return list((30 + torch.arange(sum(sizes))).split(sizes))

    def rows(self, depth: int, rows: Tensor) -> CachedFeatures:
        return CachedFeatures(self.features[rows], self.targets[rows])

    def tested(self, depth: int) -> CachedFeatures:
        return self.rows(depth, torch.arange(30))


def _ran() -> tuple[dict[str, Any], dict[str, Any]]:
    sizes = Sizes(("made up",), public=5, train=20, validation=10, removed=(2, 4), checked=20)
    (cell,) = plan(sizes, [0])
    prepared = _Prepared()
    context: Any = SimpleNamespace(
        prepared=lambda images: prepared,
        anchor=lambda images, rows, loss, seed: _model(torch.float32),
    )
    return dict(cell.arguments), run(dict(cell.arguments), context)


def test_exact_influence_is_the_true_one_at_every_l2_and_the_classical_is_not() -> None:
    arguments, result = _ran()
    assert result["wrong_classes"] == 2
    strengths = result["strengths"]
    l2s = [strength["l2"] for strength in strengths]
    assert l2s == sorted(l2s, reverse=True)
    for strength in strengths:  # J is in single precision for both
        assert strength["exact_error"] < 1e-4
        assert strength["correlation"]["exact"] > 0.9999
        assert [point["count"] for point in strength["curves"]] == arguments["removed"]
        assert len(right(strength["whole"]["test"])) == 30
        whole, without = strength["whole"], strength["curves"][0]["exact"]
        assert without["validation_loss"] < whole["validation_loss"]  # the harmful ones are gone
        # All images were checked: the classical one's agreements with both are the same.
        assert strength["correlation"]["classical"] == pytest.approx(
            strength["agreement"], abs=1e-4
        )
    assert strengths[-1]["correlation"]["classical"] < 0.99
    # Weaker penalties fit the training images better.
    losses = [strength["training_loss"] for strength in strengths]
    assert losses == sorted(losses, reverse=True)
