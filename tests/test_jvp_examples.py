"""The examples of Jacobian-vector products, reduced, against oracles: MeanFlow, NTK, Laplace."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from small_models import RightLayerNorm, assert_near, generator, shaken
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import TensorDataset

pytest.importorskip("matplotlib", reason="the demo's extra is not installed")
pytest.importorskip("sklearn", reason="the demo's extra is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import laplace
import meanflow
from dit import DiT

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ["--data", "digits", "--size", "8", "--patch", "2", "--dim", "16", "--depth", "1",
         "--heads", "2", "--batch", "32"]  # fmt: skip


def test_the_target_of_meanflow() -> None:
    """v - (t - r) du/dt and the gradient of the loss, against float64 under MATH."""
    torch.manual_seed(0)
    model = shaken(DiT(size=8, patch=2, dim=16, depth=2, heads=2), 0.2)
    z, v = (torch.randn(4, 1, 8, 8, generator=generator(seed)) for seed in (1, 2))
    r, t = torch.tensor([0.1, 0.0, 0.5, 0.3]), torch.tensor([0.4, 1.0, 0.5, 0.9])
    labels = torch.arange(4)

    def found(model: DiT, *inputs: Tensor, context) -> tuple[Tensor, list[Tensor]]:
        u, target = meanflow.average_velocity(model, *inputs, labels, context)
        assert not target.requires_grad
        grads = torch.autograd.grad((u - target).square().mean(), list(model.parameters()))
        return target, list(grads)

    mine = found(model, z, r, t, v, context=meanflow.fused_forward_ad)
    with RightLayerNorm():
        right = found(
            model.double(), *(x.double() for x in (z, r, t, v)),
            context=lambda: sdpa_kernel(SDPBackend.MATH),
        )  # fmt: skip
    assert_near(mine, right, 2e-4)
    # The derivative along the way, by differences of u in float64.
    step = 1e-5
    with torch.no_grad():
        z, r, t, v = (x.double() for x in (z, r, t, v))
        after = model(z + step * v, r, t + step, labels) - model(z - step * v, r, t - step, labels)
    expected = v - (t - r).view(-1, 1, 1, 1) * after / (2 * step)
    torch.testing.assert_close(right[0], expected, rtol=1e-5, atol=1e-5)


def test_times_are_in_order_and_a_share_differs() -> None:
    r, t = meanflow.draw_times(100, 0.25)
    assert ((r >= 0) & (t <= 1)).all()
    assert (r[:25] < t[:25]).all() and torch.equal(r[25:], t[25:])


def test_meanflow_learns_and_draws(tmp_path, capsys) -> None:
    options = meanflow.parser().parse_args([*SMALL, "--steps", "120", "--lr", "5e-3"])
    torch.manual_seed(0)
    images, labels = meanflow.load(options)
    assert images.shape == (1797, 1, 8, 8) and images.min() == -1 and images.max() == 1
    model = DiT(8, 2, 16, 1, 2)
    trained, errors = meanflow.train(model, images, labels, options)
    assert sum(errors[-20:]) < 0.8 * sum(errors[:20])
    start, end = (dict(m.named_parameters())["head.weight"] for m in (DiT(8, 2, 16, 1, 2), trained))
    assert not start.any() and end.isfinite().all() and end.any()
    assert meanflow.main([*SMALL, "--steps", "2", "--out", str(tmp_path)]) == 0
    assert "samples in 4 steps are recognised" in capsys.readouterr().out
    assert (tmp_path / "meanflow.png").read_bytes()[:8] == PNG


def test_meanflow_compares_and_refuses(tmp_path, capsys) -> None:
    assert meanflow.main([*SMALL, "--compare", "--batch", "4", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "16 tokens, cpu" in said and all(f"  {n:5}  " in said for n in ("fused", "MATH"))
    assert meanflow.main([*SMALL, "--patch", "3", "--out", str(tmp_path)]) == 2
    assert "--patch 3: 8 pixels" in capsys.readouterr().err


def test_sampling_in_steps_follows_the_velocity() -> None:
    """Of a velocity that is constant in r and t, any number of steps gives z1 - u."""
    constant = torch.randn(3, 1, 8, 8, generator=generator(3))
    noise = torch.zeros(3, 1, 8, 8)
    model = lambda z, r, t, labels: 0.1 * constant  # noqa: E731
    for steps in (1, 2, 4):
        drawn = meanflow.sample(model, noise, torch.zeros(3, dtype=torch.long), steps)
        torch.testing.assert_close(drawn, (-0.1 * constant).clamp(-1, 1))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # jacrev's
def test_the_kernel_of_a_hugging_face_vit(tmp_path, capsys, monkeypatch) -> None:
    pytest.importorskip("transformers", reason="the extra for Hugging Face is not installed")
    import ntk

    torch.manual_seed(0)
    vit = ntk.hugging_face_vit("", 16, classes=10, width=12)
    images, labels = ntk.sorted_digits(6, 16)
    assert labels.tolist() == [*range(10)] and images.shape == (10, 3, 16, 16)
    found = ntk.kernel_of(vit, images[:3], labels[:3], progress=False)
    # Row by row, in float64: an oracle of its own.
    vit.double()
    rows = []
    for image in images[:3].double():
        for output in vit(image[None]).logits[0]:
            grads = torch.autograd.grad(output, list(vit.parameters()), retain_graph=True)
            rows.append(torch.cat([grad.flatten() for grad in grads]))
    exact = (torch.stack(rows) @ torch.stack(rows).T).view(3, 10, 3, 10)
    assert_near(found, exact, 1e-5)
    assert_near(ntk.kernel_by_jacrev(vit, images[:3].double()), exact, 1e-10)
    monkeypatch.setattr(ntk, "hugging_face_vit", lambda *_, **__: vit.float())
    assert ntk.main(["--images", "10", "--out", str(tmp_path)]) == 0
    assert "relative to the largest entry" in capsys.readouterr().out
    assert (tmp_path / "ntk.png").read_bytes()[:8] == PNG
    assert ntk.main(["--images", "0", "--out", str(tmp_path)]) == 2


def test_the_variance_is_that_of_dense_algebra() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(12, 20), torch.arange(12) % 10
    problem = laplace.posterior(TensorDataset(images, labels), l2=1e-2)
    inputs = torch.randn(2, 20)
    found = laplace.predict(problem, inputs)
    tangent = problem.tangent
    names = list(tangent.deltas())
    exact = tangent.anchor.double()

    def jacobian(x: Tensor) -> Tensor:
        weights = {name: exact.get_parameter(name).detach() for name in names}
        with sdpa_kernel(SDPBackend.MATH):
            of = torch.func.jacrev(lambda w: torch.func.functional_call(exact, w, (x.double(),)))
            return torch.cat([each.flatten(2) for each in of(weights).values()], dim=2)

    rows = jacobian(images)  # (N, C, P)
    flat = torch.cat([d.detach().double().flatten() for d in tangent.deltas().values()])
    with torch.no_grad():
        logits = exact(images.double()) + rows @ flat
    p = logits.softmax(1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values, vectors = torch.linalg.eigh(hessians)
    roots = vectors * values.clamp_min(0).sqrt()[:, None, :]
    scaled = (roots.mT @ rows).flatten(0, 1)  # G with Σ JᵀAJ = GᵀG; P is too large to invert
    prior = len(images) * 1e-2
    inner = scaled @ scaled.T + prior * torch.eye(len(scaled), dtype=torch.float64)
    queries = jacobian(inputs)
    explained = queries @ scaled.T @ torch.linalg.solve(inner, scaled @ queries.mT)
    dense = (queries @ queries.mT - explained) / prior
    error = float((found.covariance - dense).abs().max() / dense.abs().max())
    assert error < 2e-2  # the tolerance of the solves is 1e-2
    draws = torch.distributions.MultivariateNormal(found.logits, found.covariance)
    torch.manual_seed(1)
    expected = draws.sample((4000,)).softmax(2).mean(0)
    torch.testing.assert_close(found.averaged(4000), expected, rtol=0, atol=0.03)


def test_calibration_error() -> None:
    """Half of the predictions of 0.9 are right: the error is 0.4."""
    probabilities = torch.tensor([[0.9, 0.1]] * 4, dtype=torch.float64)
    assert laplace.calibration_error(probabilities, torch.tensor([0, 0, 1, 1])) == pytest.approx(
        0.4
    )


def test_the_laplace_example_runs(tmp_path, capsys, monkeypatch) -> None:
    """With scikit-learn's digits, and no backbone."""
    monkeypatch.setattr(laplace, "mnist", lambda _: meanflow.digits())
    monkeypatch.setattr(laplace, "SIDE", 8)
    monkeypatch.setattr(laplace, "features", lambda images, _: images.flatten(1))
    options = ["--images", "40", "--scored", "3", "--l2", "0.1"]
    assert laplace.main([*options, "--out", str(tmp_path)]) == 0
    assert "1 - confidence, with covariance" in capsys.readouterr().out
    assert (tmp_path / "laplace.png").read_bytes()[:8] == PNG
