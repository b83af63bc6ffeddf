"""A small model with a core, and its features by torch.func, for tests of private regression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import TensorDataset

from tangent_ops import LinearizedModel, linearize
from tangent_ops.model.core_basis import core_basis
from tangent_ops.privacy import PublicCoordinates, public_coordinates

INPUTS, HIDDEN, CLASSES = 4, 6, 3
SIZE = (3, 2)
M = 15.0
N = 12


class Net(nn.Module):
    """One hidden layer, whose weight gets a core, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(INPUTS, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def samples(count: int = N, scale: float = 1.0, seed: int = 1) -> TensorDataset:
    noise = torch.Generator().manual_seed(seed)
    inputs = scale * torch.randn(count, INPUTS, generator=noise, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(CLASSES, (count,), generator=noise))


def without(data: TensorDataset, index: int) -> TensorDataset:
    kept = [i for i in range(len(data)) if i != index]
    return TensorDataset(*(column[kept] for column in data.tensors))


def tangent() -> LinearizedModel:
    torch.manual_seed(0)
    model = Net().double()
    basis = core_basis(model, samples(20, seed=7), size=SIZE, trainable=r"^(body\.weight|head)")
    return linearize(model, core=basis)


def coordinates(model: LinearizedModel, core: int = 4, head: int = 5) -> PublicCoordinates:
    return public_coordinates(
        model, samples(20, seed=8), core=core, head=head, floor=0.01, progress=False
    )


def in_coordinates(delta: Mapping[str, Tensor], where: PublicCoordinates) -> tuple[Tensor, Tensor]:
    """z and Z of a delta, by least squares."""
    flat = torch.cat([delta[n].flatten() for n, *_ in where.layout if n not in where.head_names])
    columns = torch.cat([delta[n].reshape(CLASSES, -1) for n in where.head_names], 1)
    return torch.linalg.lstsq(where.core, flat[:, None]).solution[:, 0], (
        torch.linalg.lstsq(where.head, columns.T).solution.T
    )


@dataclass(frozen=True)
class Written:
    """φ (n, C, K), a (n, L) and r (n, C) in the coordinates, from torch.func's Jacobian."""

    phi: Tensor
    inputs: Tensor
    residuals: Tensor
    where: PublicCoordinates

    @classmethod
    def of(cls, model: LinearizedModel, where: PublicCoordinates, data: TensorDataset) -> Written:
        """By differentiating the model by its deltas, one sample at a time."""
        inputs, targets = data.tensors
        deltas = {name: value.detach() for name, value in model.deltas().items()}
        names = {name: key for key, value in model.named_parameters() for name, own in
                 model.deltas().items() if own is value}  # fmt: skip

        def output(values: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(model, {names[n]: v for n, v in values.items()}, (x[None],))[0]

        core, head = [], []
        for x in inputs:
            rows = jacrev(output)(deltas, x)
            of_head = [name for name in deltas if name.startswith("head")]
            core.append(torch.cat([rows[n].flatten(1) for n in deltas if n not in of_head], 1))
            own = torch.cat([rows[n][0, 0].reshape(-1) for n in of_head])  # output 0's own row
            head.append(own)
        with torch.no_grad():
            outputs = model(inputs)
        wanted = M * nn.functional.one_hot(targets, CLASSES).double()
        phi, inputs = torch.stack(core) @ where.core, torch.stack(head) @ where.head
        return cls(phi, inputs, wanted - outputs, where)

    def rows(self) -> Tensor:
        """J in the coordinates, (n, C, K + C L)."""
        own = [torch.kron(torch.eye(CLASSES).double(), a[None]) for a in self.inputs]
        return torch.cat([self.phi, torch.stack(own)], dim=2)

    def penalty(self, l2: float, samples: int) -> Tensor:
        """Of ‖Δ‖², by the deltas of each coordinate: diagonal, (K + C L,)."""
        core, head = self.where.core.shape[1], self.where.head.shape[1]
        size = core + CLASSES * head
        deltas = [
            self.where.deltas(one[:core], one[core:].reshape(CLASSES, head))
            for one in torch.eye(size).double()
        ]
        squares = [sum(float(v.square().sum()) for v in delta.values()) for delta in deltas]
        return l2 * samples * CLASSES / 2 * torch.tensor(squares, dtype=torch.float64)

    def ridge(self, l2: float) -> Tensor:
        """The optimum without noise and clips, (K + C L,)."""
        rows, r = self.rows().flatten(0, 1), self.residuals.flatten()
        penalty = self.penalty(l2, len(self.residuals))
        return torch.linalg.solve(rows.T @ rows + penalty.diag(), rows.T @ r)
