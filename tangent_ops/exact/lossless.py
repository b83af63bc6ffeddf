"""`compose_lossless`: the fit on the union of shards, from products with the shards' Hessians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tangent_ops.composition.compose import DeltaLike, compose
from tangent_ops.data import check_integer
from tangent_ops.delta import Delta, DeltaMeta, check_anchor, load_delta
from tangent_ops.errors import ArgumentError, ConvergenceError
from tangent_ops.exact.conjugate import State, unpreconditioned
from tangent_ops.exact.curvature import Curvature, ShardCurvature
from tangent_ops.exact.layout import Layout, norm
from tangent_ops.exact.preconditioner import of_all
from tangent_ops.exact.problem import check_tolerance
from tangent_ops.exact.progress import progress_bar
from tangent_ops.losses import loss_name


def compose_lossless(
    deltas: Sequence[DeltaLike],
    curvatures: Sequence[Curvature],
    tol: float = 1e-4,
    *,
    max_iterations: int = 1000,
    max_rounds: int | None = None,
    progress: bool = True,
) -> LosslessDelta:
    """Compose shards' optima into the optimum of their union: (Σ H_s)⁻¹ Σ H_s Δ_s.

    With a quadratic loss, H_s and H_s Δ_s determine a shard's objective up to a constant. So, to
    the tolerance, the result is what `fit_exact` with the same l2 gives on all shards together. The
    plain mean, `compose`, is the same only if all H_s are equal. Conjugate gradients start from the
    mean; an iteration takes one product per shard.

    Args:
        deltas: the shards' optima, by `fit_exact`, or paths of their files.
        curvatures: each shard's v -> H_s v, as `Problem.curvature` gives it. If all are
            `ShardCurvature`s that keep J as layer factors, samples of all shards give the
            preconditioner; else the first one does, if it is a `ShardCurvature`.
        tol: ends with ‖Σ H_s (Δ - Δ_s)‖ <= tol ‖Σ H_s Δ_s‖.
        max_iterations: of conjugate gradients.
        max_rounds: products with each shard's Hessian, which may be far away, in all, at least 3.
            When they are used up, the best composition so far is returned, whatever tol is, with
            its bound.
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
    if max_rounds is not None:
        check_integer("max_rounds", max_rounds, 3)
    deltas = list(deltas)
    if len(curvatures) != len(deltas):
        raise ArgumentError(f"{len(curvatures)} curvatures for {len(deltas)} deltas")
    mean = compose(deltas)
    shards = [c for c in curvatures if isinstance(c, ShardCurvature)]
    _check_shards(shards, mean.meta)
    layout = shards[0].problem.passes.layout if shards else Layout.of_delta(mean)
    if len(shards) == len(curvatures):
        precondition = of_all([shard.problem.system for shard in shards])
    elif isinstance(curvatures[0], ShardCurvature):
        precondition = curvatures[0].preconditioner()
    else:
        precondition = unpreconditioned
    # The smallest eigenvalue of Σ H_s is at least this.
    penalty = sum(shard.samples * shard.problem.l2 for shard in shards)

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
    residual = right - product(x)
    goal, iterations, rounds = tol * norm(right), 0, 2
    best = (norm(residual), x)
    bar = progress_bar("lossless composition", "iteration", None, progress, inner=False)
    with bar:
        while (left := norm(residual)) > goal and iterations < max_iterations:
            state = State.start(residual, precondition)
            while state.residual_norm > goal / 2 and iterations < max_iterations:
                if rounds + 1 == max_rounds:  # the last one is for the true residual
                    break
                state.advance(product, precondition)
                iterations, rounds = iterations + 1, rounds + 1
                bar.set_postfix(residual=f"{state.residual_norm / norm(right):.1e}", refresh=False)
                bar.update()
            x = x + state.x
            residual, rounds = right - product(x), rounds + 1
            best = min(best, (norm(residual), x), key=lambda pair: pair[0])
            if rounds == max_rounds or norm(residual) > left / 2:
                break  # no more rounds; or only rounding is left
    left, x = best
    if left > goal and max_rounds is None:
        raise ConvergenceError(
            f"the composition's residual is {left / norm(right):.1e} after {iterations} "
            f"iterations, more than tol={tol:g}: raise max_iterations or tol, set max_rounds, or "
            "compute in float64"
        )
    found = layout.named(x)
    return LosslessDelta(
        {name: found[name].to(mean[name].dtype) for name in mean},
        mean.meta,
        converged=left <= goal,
        distance_bound=left / penalty if len(shards) == len(curvatures) else None,
        rounds=rounds,
    )


class LosslessDelta(Delta):
    """A composition of shards' optima, and how near it is to the optimum of their union.

    Attributes:
        converged: whether the tolerance was reached.
        distance_bound: a bound on ‖Δ - Δ*‖, up to rounding: ‖Σ H_s (Δ - Δ_s)‖ / Σ N_s l2; None
            unless all curvatures are `ShardCurvature`s. It assumes that the shards' deltas are
            their optima.
        rounds: products with each shard's Hessian.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        meta: DeltaMeta | None,
        *,
        converged: bool,
        distance_bound: float | None,
        rounds: int,
    ) -> None:
        super().__init__(tensors, meta)
        self.converged = converged
        self.distance_bound = distance_bound
        self.rounds = rounds


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
