"""Private mechanisms on features that are read once, and DP-SGD of ordinary models by Opacus.

The mechanisms are the library's `fit_noisy_descent` and `noisy_statistics`, which read the features
at every call; a study runs them for many options. Tests compare the two.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tangent_ops import CachedFeatures, LinearizedModel
from tangent_ops.composition.feature_rows import FeatureRows
from tangent_ops.data import Data, in_order
from tangent_ops.delta import Delta
from tangent_ops.errors import StatisticsError
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.core_basis import CoreBasis
from tangent_ops.privacy import (
    FeatureBounds,
    GroupClips,
    NoisyStatistics,
    Privacy,
    PublicCoordinates,
    Shares,
)
from tangent_ops.privacy.accounting import Phase, noise_multiplier_for
from tangent_ops.privacy.regression.noisy_solution import CURVATURE, curvature_of
from tangent_ops.privacy.regression.noisy_statistics import noise_for, sensitivities_of
from tangent_ops.privacy.regression.private_samples import shrunk
from tangent_ops.privacy.regression.samples import SampleReader
from tangent_ops.privacy.statement import make_statement

PHYSICAL_BATCH = 64


@dataclass(frozen=True, eq=False)
class Read:
    """Samples in public coordinates, at the anchor.

    Attributes:
        rows: Outputs (n, C), core (n, C, K) and head (n, L).
        residuals: (n, C).
    """

    rows: FeatureRows
    residuals: Tensor

    def narrowed(self, core: int, head: int) -> Read:
        """In the leading directions alone."""
        rows = self.rows
        kept = FeatureRows(
            rows.outputs, rows.core[:, :, :core].contiguous(), rows.head[:, :head].contiguous()
        )
        return Read(kept, self.residuals)

    def single(self) -> Read:
        """In single precision: choices take half the time, and need no more."""
        rows = self.rows
        return Read(
            FeatureRows(rows.outputs.float(), rows.core.float(), rows.head.float()),
            self.residuals.float(),
        )

    def logits(self, z: Tensor, columns: Tensor) -> Tensor:
        """(n, C), of the model with these coordinates (K,) and (C, L)."""
        return self.rows.outputs + self.rows.core @ z + self.rows.head @ columns.T


def read(tangent: LinearizedModel, data: Data, where: PublicCoordinates) -> Read:
    """Of samples, features and residuals."""
    batches = list(SampleReader(tangent, in_order(data, 64), None, None, False))
    rows = FeatureRows.joined([where.of(rows) for rows, _ in batches])
    return Read(rows, torch.cat([residuals for _, residuals in batches]))


def narrowed(where: PublicCoordinates, core: int, head: int) -> PublicCoordinates:
    """The leading directions alone; its norms are still those of all."""
    own, mixed, inputs = where.curvature
    curvature = (own[:core, :core], mixed[:core, :, :head], inputs[:head, :head])
    return replace(where, core=where.core[:, :core], head=where.head[:, :head], curvature=curvature)


def clips_of(public: Read, quantile: float, share: float) -> GroupClips:
    """Norms of the public samples' gradients; the core's share of the budget."""
    phi, inputs, residuals = public.rows.core, public.rows.head, public.residuals
    core = torch.einsum("nck,nc->nk", phi, residuals).norm(dim=1)
    head = residuals.norm(dim=1) * inputs.norm(dim=1)
    used = float(core.quantile(quantile)) if phi.shape[2] else None
    return GroupClips(used, float(head.quantile(quantile)), share)


def bounds_of(public: Read, quantile: float) -> FeatureBounds:
    """Norms of the public samples' features and residuals."""
    core, head = public.rows.core.flatten(1).norm(dim=1), public.rows.head.norm(dim=1)
    return FeatureBounds(
        float(core.quantile(quantile)) if public.rows.core.shape[2] else None,
        float(head.quantile(quantile)),
        float(public.residuals.norm(dim=1).quantile(quantile)),
    )


def descend(
    private: Read, privacy: Privacy | None, clips: GroupClips, *, lr: float, steps: int
) -> tuple[Tensor, Tensor]:
    """z (K,) and Z (C, L) after the steps of `fit_noisy_descent` with l2 = 0.

    Args:
        private: The samples; in their precision.
        privacy: The guarantee, with as many steps; None for the same steps without noise.
        clips: Of the gradients; a core's clip is None if there is none.
        lr: Of the coordinates.
        steps: T.
    """
    rows, count = private.rows, len(private.rows)
    z = rows.core.new_zeros(rows.core.shape[2])
    columns = rows.head.new_zeros(rows.outputs.shape[1], rows.head.shape[1])
    sigma = privacy.multiplier(1.0, steps) if privacy else 0.0
    source = privacy.noise_source() if privacy else None
    share = clips.core_share if clips.core else 0.0

    def noise(like: Tensor, clip: float, part: float) -> Tensor:
        if source is None:
            return torch.zeros_like(like)
        return source.normal(like.shape, clip * sigma / math.sqrt(part), like.dtype, "cpu")

    # As `clipped_gradients` has it, with what no step changes computed once.
    sizes = rows.head.norm(dim=1, keepdim=True)
    units = rows.head / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
    for _ in range(steps):
        left = private.residuals - sizes * (units @ columns.T)
        if clips.core:
            left = left - rows.core @ z
            of_core = shrunk(torch.einsum("nck,nc->nk", rows.core, left), clips.core).sum(0)
            z = z + lr * (of_core + noise(z, clips.core, share)) / count
        if clips.head:
            of_head = shrunk(left * sizes, clips.head).T @ units
            columns = columns + lr * (of_head + noise(columns, clips.head, 1 - share)) / count
    return z, columns


def release(
    sums: dict[str, Tensor],
    count: int,
    start: Delta,
    where: PublicCoordinates,
    privacy: Privacy,
    bounds: FeatureBounds,
    shares: Shares,
) -> NoisyStatistics:
    """What `noisy_statistics` releases.

    Args:
        sums: Of `clipped_sums`.
        count: Of the samples.
        start: The deltas, zeros.
        where: The coordinates, `narrowed` to those of the sums.
        privacy: The guarantee.
        bounds: As of the sums.
        shares: Of the budget.
    """
    sensitivities = sensitivities_of(where, bounds)
    parts = shares.of_sums(bool(bounds.core), bool(bounds.head))
    sigma = privacy.multiplier(1.0, 1)
    spread = {name: sensitivities[name] * sigma / math.sqrt(s) for name, s in parts.items()}
    if "least_eigenvalue" in spread:
        least = torch.linalg.eigvalsh(curvature_of(*(sums[name] for name in CURVATURE)))[0]
        sums = sums | {"least_eigenvalue": least}
    source = privacy.noise_source()
    released = {name: value for name, value in sums.items() if not value.numel()}
    released |= {n: sums[n] + noise_for(source, n, sums[n], spread[n]) for n in spread}
    if not shares.curvature:
        public = zip(CURVATURE, where.curvature, strict=True)
        released |= {name: count * block for name, block in public}
    statement = make_statement(
        mechanism="noisy statistics",
        phases=(Phase(sigma, 1.0, 1),),
        clip=1.0,
        delta=privacy.delta,
        sampling="none",
        noise=source.words,
        assumes=(),
    )
    return NoisyStatistics(where, released, spread, count, start, statement)


def solution(released: NoisyStatistics, l2: float | None) -> tuple[Tensor, Tensor]:
    """z (K,) and Z (C, L) of `NoisyStatistics.solve`; zeros if the ridge determines none."""
    where = released.coordinates
    core, outputs = where.core.shape[1], where.outputs
    try:
        delta = released.solve(l2)
    except StatisticsError:
        return torch.zeros(core).double(), torch.zeros(outputs, where.head.shape[1]).double()
    flat = [delta[name].flatten() for name, *_ in where.layout if name not in where.head_names]
    columns = torch.cat([delta[name].reshape(outputs, -1) for name in where.head_names], 1)
    # T and U have orthogonal columns, so their pseudoinverses are their transposes, divided.
    of_core, of_head = where.lengths
    z = where.core.T @ torch.cat(flat).double() / of_core
    return z, columns.double() @ where.head / of_head


def without_repetitions(features: Tensor) -> Tensor:
    """Of samples (n, ...) that are the same, bit for bit, the first: indices, ascending."""
    first = {row.numpy().tobytes(): index for index, row in reversed([*enumerate(features)])}
    return torch.tensor(sorted(first.values()))


class CoreLinear(nn.Module):
    """A frozen linear layer with W + B C A in place of W; C, zeros at first, is trained."""

    def __init__(self, layer: nn.Linear, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.core = nn.Linear(len(right), left.shape[1], bias=False).to(left)
        nn.init.zeros_(self.core.weight)
        self.left: Tensor
        self.right: Tensor
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(self.core(F.linear(x, self.right)), self.left)


def ordinary_core(anchor: nn.Module, basis: CoreBasis) -> nn.Module:
    """The ordinary, non-linear model of which C of every core and the head are trained."""
    model = copy.deepcopy(anchor).requires_grad_(False)
    for name, (left, right) in basis.items():
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(path, CoreLinear(layer, left, right))
    for name in basis.whole:
        model.get_parameter(name).requires_grad_(True)
    return model


def fit_by_opacus(
    model: nn.Module,
    data: CachedFeatures,
    privacy: Privacy,
    lr: float,
) -> None:
    """Train what requires a gradient by Opacus' DP-SGD, with AdamW as `fit_private` has it.

    Args:
        model: Trained in place.
        data: Private.
        privacy: With an ε, a clip, steps, an expected batch size and a seed.
        lr: Constant.
    """
    rate = privacy.expected_batch_size / len(data)
    assert privacy.target_epsilon is not None and privacy.seed is not None
    sigma = noise_multiplier_for(
        privacy.target_epsilon, privacy.delta, sample_rate=rate, steps=privacy.steps
    )
    torch.manual_seed(privacy.seed)
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus': secure mode is off
        made: Any = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.AdamW(trained, lr=lr, weight_decay=0.0),
            data_loader=DataLoader(data, round(privacy.expected_batch_size)),
            noise_multiplier=sigma,
            max_grad_norm=privacy.max_grad_norm or 1.0,
        )
        module, optimizer, loader = made
        _steps(module, optimizer, loader, RescaledSquareLoss(), privacy.steps)
    module.remove_hooks()
    model.eval()


def _steps(module: nn.Module, optimizer: Any, loader: Any, loss: nn.Module, steps: int) -> None:
    done = 0
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
