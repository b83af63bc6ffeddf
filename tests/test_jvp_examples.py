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


def test_the_head_is_that_of_dense_algebra() -> None:
    """l2, the noise, the covariance and the probabilities, by inverses and by fits without one."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 10
    images = 0.7 * torch.eye(10, 14)[labels] + 0.3 * torch.randn(60, 14)
    inputs = torch.randn(3, 14)
    head = laplace.Head(TensorDataset(images, labels))
    found = head.predict(inputs)
    rows, queries = (torch.cat([x, torch.ones(len(x), 1)], 1).double() for x in (images, inputs))
    targets = 15 * torch.eye(10, dtype=torch.float64)[labels]  # all outputs have the same rows

    def inverse(some: Tensor, l2: float) -> Tensor:
        return torch.linalg.inv(some.T @ some + l2 * 5 * len(some) * torch.eye(15))

    def validation(l2: float) -> float:
        hat = rows @ inverse(rows, l2) @ rows.T
        return float((targets - hat @ targets).square().mean() / (1 - hat.trace() / 60) ** 2)

    l2 = min((10 ** (k / 2) for k in range(-16, 7)), key=validation)
    assert head.l2 == pytest.approx(l2)
    weights = inverse(rows, l2) @ rows.T @ targets
    torch.testing.assert_close(found.outputs, queries @ weights, rtol=1e-5, atol=1e-5)
    products = []
    for one in range(60):
        kept = torch.arange(60) != one
        without = inverse(rows[kept], l2) @ rows[kept].T @ targets[kept]
        products.append((targets - rows @ weights)[one] * (targets - rows @ without)[one])
    noise = float(torch.stack(products).mean())
    assert head.noise == found.noise == pytest.approx(noise, rel=1e-5)
    variance = noise * (queries @ inverse(rows, l2) * queries).sum(1)
    exact = variance[:, None, None] * torch.eye(10)
    torch.testing.assert_close(found.covariance, exact, rtol=1e-5, atol=1e-6)
    covariance = exact + torch.randn(10, 10).cov()  # of a model with a core: not diagonal
    other = laplace.Predictions(queries @ weights, covariance, noise)
    for certain in (True, False):
        spread = noise * torch.eye(10, dtype=torch.float64)
        spread = spread.expand(3, 10, 10) if certain else covariance + spread
        normal = torch.distributions.MultivariateNormal(other.outputs, spread)
        density = torch.stack([normal.log_prob(target) for target in 15 * torch.eye(10).double()])
        torch.testing.assert_close(other.probabilities(certain=certain), density.softmax(0).T)


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
    options = ["--images", "200", "--scored", "50", "--out", str(tmp_path)]
    assert laplace.main(options) == 0
    said = capsys.readouterr().out
    assert said.count("1 - confidence, covariance") == 2 and "turned digits against" in said
    assert (tmp_path / "laplace.png").read_bytes()[:8] == PNG
