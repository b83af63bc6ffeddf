"""Fits of a shard with public samples against the formula on explicit Jacobians, in float64."""

from __future__ import annotations

import pytest
import torch
from dense import CLASSES, Dense
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tangent_ops import fit_exact, with_public
from tangent_ops.errors import ArgumentError
from tangent_ops.exact import Problem
from tangent_ops.losses import RescaledSquareLoss

L2 = 0.05
OWN, PUBLIC = [0, 1, 2, 5], [3, 4, 6, 7, 8, 9, 10]


def formula(dense: Dense, own: list[int], public: list[int], top: float = 15.0) -> Tensor:
    """The zero of -(2/nC) Σ_own Jᵀr + 2/((n+p)C) Σ_both JᵀJ Δ + l2 Δ, (P,)."""
    wanted = dense.targets * (top / 15)
    gradient = 2 / CLASSES * dense.jacobian[own].flatten(0, 1).T
    gradient = gradient @ (wanted - dense.anchor)[own].flatten() / len(own)
    both = dense.jacobian[own + public].flatten(0, 1)
    hessian = 2 / CLASSES * both.T @ both / len(own + public)
    hessian.diagonal().add_(L2)
    return torch.linalg.solve(hessian, gradient)


def fitted(dense: Dense, data: Dataset) -> Tensor:
    fit_exact(dense.problem(L2, data, loss=nn.MSELoss()), tol=1e-12)
    return dense.delta.clone()


def test_the_fit_is_the_formula(dense: Dense) -> None:
    dense.set(torch.ones_like(dense.delta))  # which must not count
    public = [dense.data[index] for index in PUBLIC]
    public = TensorDataset(torch.stack([x for x, _ in public]), torch.zeros(len(public)).long())
    data = with_public(dense.tangent, dense.kept(*OWN), public, batch_size=3, progress=False)
    assert len(data) == len(OWN) + len(PUBLIC)
    found, expected = fitted(dense, data), formula(dense, OWN, PUBLIC)
    assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())
    alone = dense.optimum(L2, keep=OWN)
    assert float((found - alone).norm()) > 0.1 * float(alone.norm())


def test_other_targets_of_the_loss(dense: Dense) -> None:
    loss = RescaledSquareLoss(M=3.0)
    data = with_public(dense.tangent, dense.kept(*OWN), dense.kept(*PUBLIC), loss=loss)
    expected = formula(dense, OWN, PUBLIC, top=3.0)
    assert float((fitted(dense, data) - expected).norm()) <= 1e-9 * float(expected.norm())


class Fields(Dataset):
    """Samples as dicts."""

    def __init__(self, data: Dataset, label: str) -> None:
        self.data, self.label = data, label

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int):
        image, target = self.data[index]
        return {"x": image, self.label: target}


def test_dicts(dense: Dense) -> None:
    own, public = dense.kept(*OWN), dense.kept(*PUBLIC)
    data = with_public(dense.tangent, Fields(own, "label"), Fields(public, "labels"))
    plain = with_public(dense.tangent, own, public)
    for sample, (image, target) in zip(data, plain, strict=True):  # type: ignore[arg-type]
        assert sample.keys() == {"x", "labels"}
        torch.testing.assert_close(sample["x"], image, rtol=0, atol=0)
        torch.testing.assert_close(sample["labels"], target, rtol=0, atol=0)


def test_the_models_modes_are_restored(dense: Dense) -> None:
    dense.tangent.anchor.train()
    try:
        with_public(dense.tangent, dense.kept(*OWN), dense.kept(*PUBLIC))
        assert all(module.training for module in dense.tangent.anchor.modules())
    finally:
        dense.tangent.anchor.eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": nn.MSELoss()}, "k = 1, got MSELoss"),
        ({"loss": RescaledSquareLoss(k=2)}, "k = 1, got Rescaled"),
        ({"shard": "loader"}, "shard must be a Dataset"),
        ({"public": "loader"}, "public must be a Dataset"),
        ({"public": "empty"}, "empty"),
        ({"shard": "float"}, "class indices, got"),
        ({"shard": "large"}, "from 0 to 4, got 0 to 5"),
    ],
)
def test_refused(dense: Dense, change: dict, message: str) -> None:
    images = dense.data.tensors[0]
    others = {
        "loader": DataLoader(dense.data),
        "empty": TensorDataset(images[:0], images[:0]),
        "float": TensorDataset(images[:2], torch.rand(2)),
        "large": TensorDataset(images[:2], torch.tensor([0, 5])),
    }
    given = {"shard": dense.kept(*OWN), "public": dense.kept(*PUBLIC)}
    given |= {name: others.get(value, value) for name, value in change.items()}
    with pytest.raises(ArgumentError, match=message):
        with_public(dense.tangent, **given)


def test_in_single_precision(dense: Dense) -> None:
    single = dense.in_single()
    data = with_public(single.tangent, single.kept(*OWN), single.kept(*PUBLIC))
    assert data[0][1].dtype == torch.float32
    problem = Problem(single.tangent, data, L2, loss=nn.MSELoss(), progress=False)
    assert fit_exact(problem, tol=1e-3).converged
    expected = formula(dense, OWN, PUBLIC)
    assert float((single.delta.double() - expected).norm()) <= 1e-2 * float(expected.norm())


class Shaken(Dataset):
    """Other inputs at every reading, as random augmentation gives."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int):
        image, target = self.data[index]
        return image + 0.1 * torch.randn_like(image), target


def test_a_fit_refuses_another_loss_and_augmented_data(dense: Dense) -> None:
    data = with_public(dense.tangent, dense.kept(*OWN), dense.kept(*PUBLIC))
    with pytest.raises(ArgumentError, match="targets must be int64 class indices"):
        fit_exact(dense.problem(L2, data))
    data = with_public(dense.tangent, Shaken(dense.kept(*OWN)), dense.kept(*PUBLIC))
    with pytest.raises(ArgumentError, match="two readings"):
        fit_exact(dense.problem(L2, data, loss=nn.MSELoss()))
