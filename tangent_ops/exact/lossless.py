"""`compose_lossless`: the fit on the union of shards, from products with the shards' Hessians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from tqdm import tqdm

from tangent_ops.composition.compose import DeltaLike, compose
from tangent_ops.data import check_integer
from tangent_ops.delta import Delta, DeltaMeta, check_anchor, load_delta
from tangent_ops.errors import ArgumentError, ConvergenceError
from tangent_ops.exact.conjugate import State, unpreconditioned
from tangent_ops.exact.curvature import Curvature, ShardCurvature
from tangent_ops.exact.layout import Layout, norm
from tangent_ops.exact.problem import check_tolerance
from tangent_ops.losses import loss_name


def compose_lossless(
    deltas: Sequence[DeltaLike],
    curvatures: Sequence[Curvature],
    tol: float = 1e-4,
    *,
    max_iterations: int = 1000,
    progress: bool = True,
) -> Delta:
    """Compose shards' optima into the optimum of their union: (Σ H_s)⁻¹ Σ H_s Δ_s.

    With a quadratic loss, H_s and H_s Δ_s determine a shard's objective up to a constant. So, to
    the tolerance, the result is what `fit_exact` with the same l2 gives on all shards together. The
    plain mean, `compose`, is the same only if all H_s are equal. Conjugate gradients start from the
    mean; an iteration takes one product per shard.

    Args:
        deltas: the shards' optima, by `fit_exact`, or paths of their files.
        curvatures: each shard's v -> H_s v, as `Problem.curvature` gives it. The first one gives
            the preconditioner, if it is a `ShardCurvature`.
        tol: ends with ‖Σ H_s (Δ - Δ_s)‖ <= tol ‖Σ H_s Δ_s‖.
        max_iterations: of conjugate gradients.
        progress: show a progress bar.

    Returns:
        The composition, with the `meta` that `compose` gives.

    Raises:
        ArgumentError: not as many curvatures as deltas, `ShardCurvature`s of several l2 or losses,
            or as in `compose`.
        DeltaError: as in `compose`; a product that does not fit the deltas; a `ShardCurvature` of
            another anchor.
        ConvergenceError: the tolerance was not reached.
    """
    check_integer("max_iterations", max_iterations, 1)
    check_tolerance(tol)
    deltas = list(deltas)
    if len(curvatures) != len(deltas):
        raise ArgumentError(f"{len(curvatures)} curvatures for {len(deltas)} deltas")
    mean = compose(deltas)
    _check_shards([c for c in curvatures if isinstance(c, ShardCurvature)], mean.meta)
    first = curvatures[0]
    if isinstance(first, ShardCurvature):
        layout, precondition = first.problem.passes.layout, first.preconditioner()
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
        whole = shard.problem.tangent
        check_anchor(meta, whole.fingerprint, whole.model_name, "the shards' composition")
    for what, found in (
        ("l2", {shard.problem.l2 for shard in shards}),
        ("loss", {loss_name(shard.problem.loss) for shard in shards}),
    ):
        if len(found) > 1:
            raise ArgumentError(f"curvatures have several {what}, {sorted(found)}: use one for all")
