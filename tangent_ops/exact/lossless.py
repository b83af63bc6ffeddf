"""Composition that loses nothing: the fit on the union of shards, from products with their H."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from tqdm import tqdm

from tangent_ops.composition.compose import DeltaLike, compose
from tangent_ops.data import Data, check_integer
from tangent_ops.delta import Delta, DeltaMeta, check_anchor, load_delta
from tangent_ops.errors import ArgumentError, ConvergenceError, UnsupportedError
from tangent_ops.exact.conjugate import State, unpreconditioned
from tangent_ops.exact.layout import Layout, norm
from tangent_ops.exact.nystrom import preconditioner
from tangent_ops.exact.problem import Problem
from tangent_ops.exact.search import loss_name
from tangent_ops.losses import Loss
from tangent_ops.model.linearized import LinearizedModel

Curvature = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class ShardCurvature:
    """v -> H v with H = Σ_i J_iᵀ A_i J_i + N l2 I over one shard's N samples.

    What a shard gives to `compose_lossless` and `forget_without_data`: products, never data. It
    may be called here, in another process, or on another machine.

    Args:
        tangent: the model; its deltas do not matter.
        data: the shard's, as in `fit_exact`.
        l2: of the shard's own fit; the same in all shards.
        loss: as in `fit_exact`, but quadratic: only then H is the same everywhere.
        batch_size: as in `fit_exact`.
        cache: as in `fit_exact`.
        progress: show bars.

    Raises:
        ArgumentError: as in `fit_exact`.
        UnsupportedError: the loss is not quadratic.
    """

    def __init__(
        self,
        tangent: LinearizedModel,
        data: Data,
        l2: float,
        *,
        loss: Loss | None = None,
        batch_size: int = 64,
        cache: bool | str | os.PathLike[str] = False,
        progress: bool = True,
    ) -> None:
        self.problem = Problem(
            tangent, data, l2, loss, batch_size=batch_size, cache=cache, progress=progress
        )
        if not self.problem.quadratic:
            raise UnsupportedError(
                "a shard's curvature stands for the shard only if the loss is quadratic: use "
                "RescaledSquareLoss"
            )

    @property
    def samples(self) -> int:
        return self.problem.samples

    def __call__(self, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """H v, named and shaped as v."""
        layout = self.problem.layout
        product = self.problem.product(layout.flat(direction, "the direction"))
        return layout.named(product.mul_(self.samples))

    def preconditioner(self, rank: int | None = None) -> Callable[[Tensor], Tensor]:
        """An approximate inverse for all shards that are like this one, up to a factor."""
        return preconditioner(self.problem, rank)


def compose_lossless(
    deltas: Sequence[DeltaLike],
    curvatures: Sequence[Curvature],
    tol: float = 1e-4,
    *,
    max_iterations: int = 1000,
    progress: bool = True,
) -> Delta:
    """Compose shards' optima into the optimum of their union: (Σ H_s)⁻¹ Σ H_s Δ_s.

    With a quadratic loss, H_s Δ_s is all that a shard says about its data, so the result is what
    `fit_exact` with the same l2 gives on all of them together, to the tolerance. The plain mean,
    `compose`, is only that if all H_s are equal. Solved by conjugate gradients from the mean; one
    product with every shard to an iteration.

    Args:
        deltas: the shards' optima, by `fit_exact`, or paths of their files.
        curvatures: of each shard v -> H_s v, as `ShardCurvature`. If the first is one, it gives
            the preconditioner.
        tol: ends with ‖Σ H_s (Δ - Δ_s)‖ <= tol ‖Σ H_s Δ_s‖.
        max_iterations: of conjugate gradients.
        progress: show a progress bar.

    Returns:
        The composition, with the `meta` that `compose` gives.

    Raises:
        ArgumentError: not as many curvatures as deltas, `ShardCurvature`s of several l2 or losses,
            or as in `compose`.
        DeltaError: as in `compose`; or a product that does not fit the deltas, or a
            `ShardCurvature` that is of another anchor.
        ConvergenceError: the tolerance was not reached.
    """
    check_integer("max_iterations", max_iterations, 1)
    if not 0 < tol < 1:
        raise ArgumentError(f"tol must be between 0 and 1, got {tol}")
    deltas = list(deltas)
    if len(curvatures) != len(deltas):
        raise ArgumentError(f"{len(curvatures)} curvatures for {len(deltas)} deltas")
    mean = compose(deltas)
    _check_shards([c for c in curvatures if isinstance(c, ShardCurvature)], mean.meta)
    first = curvatures[0]
    if isinstance(first, ShardCurvature):
        layout, precondition = first.problem.layout, first.preconditioner()
    else:
        layout, precondition = Layout.of_delta(mean), unpreconditioned

    def product_of(curvature: Curvature, number: int, vector: Tensor) -> Tensor:
        return layout.flat(curvature(layout.named(vector)), f"the product of shard {number}")

    def product(vector: Tensor) -> Tensor:
        total = layout.zeros()
        for number, curvature in enumerate(curvatures):
            total += product_of(curvature, number, vector)
        return total

    right = layout.zeros()
    for number, (item, curvature) in enumerate(zip(deltas, curvatures, strict=True)):
        delta = item if isinstance(item, Mapping) else load_delta(item)
        right += product_of(curvature, number, layout.flat(delta))
    x = layout.flat(mean)
    goal, iterations = tol * norm(right), 0
    residual = right - product(x)
    bar = tqdm(desc="lossless composition", unit="iteration", disable=not progress)
    with bar:
        while (left := norm(residual)) > goal and iterations < max_iterations:
            state = State.start(residual, precondition)
            while state.residual_norm > goal / 2 and iterations < max_iterations:
                state.advance(product, precondition)
                iterations += 1
                bar.set_postfix(residual=f"{state.residual_norm / norm(right):.1e}", refresh=False)
                bar.update()
            x += state.x
            residual = right - product(x)
            if norm(residual) > left / 2:
                break  # rounding
    if norm(residual) > goal:
        raise ConvergenceError(
            f"the composition's residual is {norm(residual) / norm(right):.1e} after {iterations} "
            f"iterations, more than tol={tol:g}: raise max_iterations or tol, or compute in float64"
        )
    found = layout.named(x)
    return Delta({name: found[name].to(mean[name].dtype) for name in mean}, mean.meta)


def _check_shards(shards: Sequence[ShardCurvature], meta: DeltaMeta | None) -> None:
    for shard in shards:
        whole = shard.problem.whole
        check_anchor(meta, whole.fingerprint, whole.model_name, "the shards' composition")
    for what, found in (
        ("l2", {shard.problem.l2 for shard in shards}),
        ("loss", {loss_name(shard.problem.loss) for shard in shards}),
    ):
        if len(found) > 1:
            raise ArgumentError(f"curvatures have several {what}, {sorted(found)}: use one for all")
