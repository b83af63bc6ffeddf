"""Bases of cores against second moments by one backward pass for each sample and output."""

from __future__ import annotations

import re

import pytest
import torch
from small_models import generator, images, vit
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tangent_ops import core_basis, gradient_basis, linearize
from tangent_ops.errors import ArgumentError, NonFiniteLossError
from tangent_ops.model.core_basis import CoreBasis, _chosen_sizes, _Spectrum

LAST = r"^(blocks\.2\.(attn|mlp)\..*weight|head\.)"


def data(count: int = 7, seed: int = 3) -> TensorDataset:
    inputs = images(count, seed=seed).double()
    return TensorDataset(inputs, torch.randint(5, (count,), generator=generator(seed)))


def moments(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Σ g gᵀ and Σ a aᵀ of a linear layer, over samples, positions and outputs."""
    layer = model.get_submodule(name.removesuffix(".weight"))
    seen: list[Tensor] = []
    made: list[Tensor] = []

    def keep(_, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append(inputs[0])
        made.append(output)

    layer.register_forward_hook(keep)
    left: Tensor | float = 0.0
    right: Tensor | float = 0.0
    for one in data().tensors[0].split(1):
        for column in range(5):
            output = model(one)[0, column]
            (grad,) = torch.autograd.grad(output, made[-1])
            g, a = grad.flatten(0, -2), seen[-1].flatten(0, -2)
            left = left + g.T @ g
        right = right + a.T @ a
    return left, right.detach()  # type: ignore[return-value,union-attr]


def test_the_sides_span_the_leading_eigenvectors_of_the_moments() -> None:
    model = vit().double()
    basis = core_basis(model, data(), (3, 2), batch_size=4)
    assert sorted(basis) == [
        f"blocks.2.{part}.weight" for part in ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")
    ]
    assert basis.whole == ("head.bias", "head.weight")
    for name, (left, right) in basis.items():
        assert left.shape[1] == 3 and len(right) == 2
        for side, moment in zip((left.T, right), moments(vit().double(), name), strict=True):
            values, vectors = torch.linalg.eigh(moment)
            exact = vectors.flip(1)[:, : len(side)].T
            torch.testing.assert_close(side.T @ side, exact.T @ exact, rtol=1e-7, atol=1e-7)
            ratios = torch.einsum("ri,ij,rj->r", side, moment, side) / values.flip(0)[: len(side)]
            torch.testing.assert_close(ratios, torch.ones_like(ratios))


def test_it_is_deterministic_and_has_the_tangent_models_fingerprint() -> None:
    model = vit().double()
    basis, again = core_basis(model, data(), 3), core_basis(model, data(), 3)
    assert basis.fingerprint == again.fingerprint
    assert basis.fingerprint != core_basis(model, data(seed=4), 3).fingerprint
    tangent = linearize(model, core=basis)
    assert tangent.basis_fingerprint == basis.fingerprint
    assert tangent.basis_remembers == basis.remembers and len(basis.remembers) == 7
    assert set(tangent.deltas()) == {*basis, "head.weight", "head.bias"}
    assert all(re.search(basis.trainable, name) for name in tangent.deltas())
    assert basis.directions == 36


def test_vectors_of_the_block_are_trained_in_full_if_asked() -> None:
    model = vit().double()
    tangent = linearize(model, core=core_basis(model, data(), 2, vectors=True))
    names = {n for n, p in model.named_parameters() if n.startswith(("blocks.2.", "head."))}
    assert set(tangent.deltas()) == names
    assert tangent.deltas()["blocks.2.norm1.weight"].shape == (48,)
    assert tangent.deltas()["blocks.2.attn.qkv.weight"].shape == (2, 2)


def test_directions_are_spent_on_the_largest_products_of_eigenvalues() -> None:
    model = vit().double()
    products = {
        name: tuple(torch.linalg.eigvalsh(m).flip(0) for m in moments(vit().double(), name))
        for name in core_basis(model, data(), 1)
    }
    found = core_basis(model, data(), directions=60)
    assert 50 <= found.directions <= 60

    def mass(basis: CoreBasis) -> float:
        return sum(
            float(products[n][0][: left.shape[1]].sum() * products[n][1][: len(right)].sum())
            for n, (left, right) in basis.items()
        )

    # As good as the best choice of equal sizes with as many numbers (4 x 3 x 5 and 4 x 15).
    for size in ((3, 5), (5, 3), (4, 3)):
        assert mass(found) >= mass(core_basis(model, data(), size))
    largest = max(products, key=lambda n: float(products[n][0][0] * products[n][1][0]))
    one = core_basis(model, data(), directions=1)
    assert list(one) == [largest] and one.directions == 1


def test_a_row_or_column_is_worth_its_products_per_number() -> None:
    def spectrum(*values: float) -> _Spectrum:
        side = torch.tensor(values, dtype=torch.float64)
        return _Spectrum((side, torch.eye(len(side))), (side, torch.eye(len(side))))

    spectra = {"a": spectrum(4.0, 1.0), "b": spectrum(3.9), "c": spectrum(3.0**0.5)}
    # After a's row (4 for one number), its second column adds 5 for two numbers, c 3 for one.
    assert _chosen_sizes(spectra, 5) == {"a": (2, 1), "b": (1, 1), "c": (1, 1)}
    assert _chosen_sizes(spectra, 6) == {"a": (2, 2), "b": (1, 1), "c": (1, 1)}


def test_sides_are_no_larger_than_the_weight() -> None:
    basis = core_basis(vit().double(), data(), (10_000, 10_000), trainable=r"^head|proj\.weight")
    left, right = basis["blocks.2.attn.proj.weight"]
    assert left.shape == (48, 48) and right.shape == (48, 48)


def test_gradients_singular_vectors() -> None:
    model = vit().double()
    basis = core_basis(model, data(), (2, 3), method="gradient")
    rows = gradient_basis(model, data(), 3, trainable=LAST)
    for name, (left, right) in basis.items():
        torch.testing.assert_close(right, rows[name])
        eye = torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(left.T @ left, eye)


def test_random_sides_need_no_data_and_remember_none() -> None:
    model = vit()
    basis = core_basis(model, None, 3, method="random", seed=5)
    assert not basis.remembers
    seeded = linearize(model, LAST, core=3, basis=5)
    for name, (left, right) in basis.items():
        assert torch.equal(right, seeded.basis.tensors()[name])
        assert torch.equal(left, seeded.left.tensors()[name])


def test_the_model_is_not_changed() -> None:
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    single = TensorDataset(data().tensors[0].float(), data().tensors[1])
    core_basis(model, single, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method must be one of"),
        ({"size": 0}, "core=0: expected a positive integer"),
        ({"directions": 0}, "directions must be an integer"),
        ({"directions": 9, "method": "gradient"}, "directions is for method 'kfac'"),
        ({"method": "random"}, "method 'random' takes no public_data"),
        ({"public_data": None}, "method 'kfac' needs public_data"),
        ({"trainable": "norm"}, "no matrix outside of the classifier"),
        ({"model": linearize(vit())}, "linearized already"),
    ],
)
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        core_basis(**{"model": vit(), "public_data": data(), **options})


def test_weights_that_no_linear_layer_uses_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"no linear layer uses .*unused"):
        model = vit().double()
        model.blocks[-1].unused = nn.Parameter(torch.zeros(3, 3).double())
        core_basis(model, data(), 2, trainable=r"^blocks\.")


def test_values_that_are_not_finite_are_refused() -> None:
    bad = data()
    bad.tensors[0][1] = torch.nan
    with pytest.raises(NonFiniteLossError, match="not finite"):
        core_basis(vit().double(), bad, 2)
