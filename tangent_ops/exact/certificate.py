"""`Certificate`: a bound on a delta's distance from a problem's optimum; it can be recomputed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from tangent_ops.data import inputs_of
from tangent_ops.delta import Delta, fingerprint
from tangent_ops.errors import ArgumentError, CertificateError
from tangent_ops.exact.jacobian import Jacobian
from tangent_ops.exact.layout import norm
from tangent_ops.exact.passes import Passes
from tangent_ops.exact.problem import Problem, check_problem
from tangent_ops.losses import loss_name
from tangent_ops.model.linearized import LinearizedModel

METHOD = "gradient over the data, in float64"
CACHED = "; what enters the first trained block was computed in the model's precision"

# Changes by another order of summation, on another machine or with another batch size.
ROUNDING = 1e-6  # of a bound
ROUNDING_OF_SIZE = 1e-9  # of ‖Δ‖: near the optimum, terms of that size cancel


@dataclass(frozen=True)
class Certificate:
    """‖Δ - Δ*‖ <= distance_bound, where Δ* is the minimum of mean loss + l2/2 ‖Δ‖² over the data.

    F is l2-strongly convex, so ‖Δ - Δ*‖ <= ‖∇F(Δ)‖ / l2 for every Δ, however it was computed (Boyd,
    Vandenberghe, "Convex Optimization", 2004, eq. 9.11).

    Attributes:
        distance_bound: in the Euclidean norm over all trained parameters.
        gradient_norm: ‖∇F(Δ)‖.
        l2: the penalty's weight.
        samples: N.
        loss: the loss, in words.
        method: how the gradient was computed.
        assumes: what must be true for the bound to hold.
        anchor: `fingerprint` of the anchor.
        delta: `fingerprint` of the delta.
        data: `Problem.data_sha256`; None if the certificate was made without the data.
    """

    distance_bound: float
    gradient_norm: float
    l2: float
    samples: int
    loss: str
    method: str
    assumes: tuple[str, ...]
    anchor: str
    delta: str
    data: str | None
    _problem: Problem | None = field(default=None, repr=False, compare=False)
    _kept: Delta | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return (
            f"Certificate(‖Δ - Δ*‖ <= {self.distance_bound:.4g}: gradient "
            f"{self.gradient_norm:.4g}, l2 {self.l2:g}, {self.samples} samples, {self.loss})"
        )

    def logit_bound(
        self, tangent: LinearizedModel, inputs: Tensor | Mapping[str, Tensor]
    ) -> Tensor:
        """Bounds on the logits' distances from the optimum's: ‖J(x)ᵀ e_c‖ times `distance_bound`.

        Args:
            tangent: the model.
            inputs: (M, ...), a batch.

        Returns:
            (M, ...): float64, shaped as the model's output.
        """
        jacobian = Jacobian(tangent)
        bounds = []
        fields = inputs_of(inputs) if isinstance(inputs, Mapping) else inputs
        for one in fields.split(1):
            output, _ = jacobian.outputs(None, one)
            bounds.append(jacobian.rows(one).double().norm(dim=1).view(output.shape[1:]))
        return self.distance_bound * torch.stack(bounds)

    def verify(
        self, problem: Problem | None = None, delta: Mapping[str, Tensor] | None = None
    ) -> Certificate:
        """Recompute the bound in float64, and compare, allowing for rounding.

        Rounding may add 1e-6 of the bound and 1e-9 ‖Δ‖. The data are read again, and must be the
        same. Cached features are not computed again: pass a new `Problem` to check these, too.

        Args:
            problem: the certificate's problem, with `cache` as it was.
            delta: the certificate's delta. Both may be left out if `certify` made this object; a
                certificate that was read from JSON needs them.

        Returns:
            The new certificate.

        Raises:
            ArgumentError: arguments are missing.
            CertificateError: another anchor, delta, data, loss or l2, or a larger bound.
        """
        problem = self._problem if problem is None else problem
        delta = self._kept if delta is None else delta
        if problem is None or delta is None:
            raise ArgumentError(
                "verify needs problem and delta, for a certificate that was read from JSON, or "
                "that was made without the data"
            )
        fresh = certify(problem, delta)
        if problem.cached:
            fresh = replace(fresh, data=problem.read_sha256())
        for name in ("anchor", "delta", "loss", "l2", "samples", "data", "method"):
            claimed, found = getattr(self, name), getattr(fresh, name)
            if claimed is not None and claimed != found:
                raise CertificateError(f"the certificate is for another {name}: {claimed}, {found}")
        size = sum(float(value.double().square().sum()) for value in delta.values()) ** 0.5
        allowed = self.distance_bound * (1 + ROUNDING) + ROUNDING_OF_SIZE * size
        if not fresh.distance_bound <= allowed:
            raise CertificateError(
                f"the certificate claims a distance of {self.distance_bound:.6g} at most; "
                f"recomputed, the bound is {fresh.distance_bound:.6g}"
            )
        return fresh

    def to_json(self) -> str:
        """All public fields as JSON."""
        record = {item.name: getattr(self, item.name) for item in fields(self) if item.compare}
        return json.dumps(record, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read what `to_json` gave.

        Raises:
            ArgumentError: text is something else.
        """
        try:
            record: dict[str, Any] = json.loads(text)
            return cls(**{**record, "assumes": tuple(record["assumes"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ArgumentError(f"text is no certificate's JSON: {error}") from error


def certify(problem: Problem, delta: Mapping[str, Tensor] | None = None) -> Certificate:
    """Bound the distance of a delta from the problem's optimum.

    One pass over the data in float64, with a copy of the model; cached features keep the model's
    own precision. A model in float64 whose layer factors have been computed takes these: a gradient
    is a single pass, so factors are not computed for it.

    Args:
        problem: model, data, loss and penalty.
        delta: the delta; None for the model's own.

    Raises:
        ArgumentError: problem is no `Problem`, or its model was moved, cast or loaded.
        DeltaError: the delta does not fit the model.
    """
    check_problem(problem)
    tangent = problem.tangent
    delta = tangent.delta_dict() if delta is None else delta
    kept = Delta({name: value.detach().clone() for name, value in delta.items()})
    problem.flat(kept)  # raises unless the delta fits
    size = norm_of_gradient(problem, kept)
    return Certificate(
        distance_bound=size / problem.l2,
        gradient_norm=size,
        l2=problem.l2,
        samples=problem.samples,
        loss=loss_name(problem.loss),
        method=METHOD + CACHED if problem.cached else METHOD,
        assumes=(
            "the loss is convex in the logits",
            "the anchor does not depend on data that are not among these",
        ),
        anchor=tangent.fingerprint,
        delta=fingerprint(kept),
        data=problem.data_sha256,
        _problem=problem,
        _kept=kept,
    )


def norm_of_gradient(problem: Problem, delta: Mapping[str, Tensor]) -> float:
    """‖∇F(Δ)‖ in float64: from factors in float64 that are there already, else by a pass."""
    stored = problem.computed_in_double
    if stored is None:
        return gradient_in_double(problem.passes, delta)
    _, gradient, _ = stored.gradient(stored.layout.flat(delta))
    return norm(gradient)


def gradient_in_double(passes: Passes, delta: Mapping[str, Tensor]) -> float:
    """‖∇F(Δ)‖, computed in float64 with a copy of the model."""
    double = passes.in_double()
    _, gradient, _ = double.gradient(double.layout.flat(delta), "certificate")
    return norm(gradient)
