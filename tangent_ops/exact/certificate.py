"""A bound on a delta's distance from the optimum of a stated problem, that can be recomputed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tangent_ops.data import Data
from tangent_ops.delta import Delta, fingerprint
from tangent_ops.errors import ArgumentError, CertificateError
from tangent_ops.exact.jacobian import Jacobian
from tangent_ops.exact.layout import norm
from tangent_ops.exact.problem import Problem
from tangent_ops.exact.search import loss_name
from tangent_ops.losses import Loss
from tangent_ops.model.linearized import LinearizedModel

METHOD = "gradient over the data, in float64"
CACHED = "; what enters the first trained block was computed in the model's precision"

# What another order of summation may change, on another machine or with another batch size.
ROUNDING = 1e-6  # of a bound
ROUNDING_OF_SIZE = 1e-9  # of ‖Δ‖: near the optimum, terms of that size cancel


@dataclass(frozen=True)
class Certificate:
    """‖Δ - Δ*‖ <= distance_bound, where Δ* is the minimum of mean loss + l2/2 ‖Δ‖² over the data.

    F is l2-strongly convex, so ‖Δ - Δ*‖ <= ‖∇F(Δ)‖ / l2 wherever Δ comes from (Boyd,
    Vandenberghe, "Convex Optimization", 2004, eq. 9.11).

    Attributes:
        distance_bound: in the Euclidean norm over all trained parameters.
        gradient_norm: ‖∇F(Δ)‖.
        l2: the penalty's weight.
        samples: N.
        loss: the loss, in words.
        method: how the gradient was had.
        assumes: what has to be true for the bound to hold.
        anchor: `fingerprint` of the anchor.
        delta: `fingerprint` of the delta.
        data: SHA-256 of inputs and targets in order; None if they were not here.
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
    _made_of: _MadeOf | None = field(default=None, repr=False, compare=False)

    def logit_bound(self, tangent: LinearizedModel, inputs: Tensor) -> Tensor:
        """How far each logit of each input can be from the optimum's: ‖J(x)ᵀ e_c‖ times the bound.

        Args:
            tangent: the model.
            inputs: (M, ...), a batch.

        Returns:
            (M, ...): float64, shaped as the model's output.
        """
        jacobian = Jacobian(tangent)
        bounds = []
        for one in inputs[:, None]:
            output, _ = jacobian.outputs(None, one)
            bounds.append(jacobian.rows(one).double().norm(dim=1).view(output.shape[1:]))
        return self.distance_bound * torch.stack(bounds)

    def verify(
        self,
        tangent: LinearizedModel | None = None,
        data: Data | None = None,
        delta: Mapping[str, Tensor] | None = None,
        *,
        loss: Loss | None = None,
        batch_size: int = 64,
        cache: bool | str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> Certificate:
        """Compute the bound anew, in float64, and compare, but for rounding: 1e-9 ‖Δ‖.

        Without arguments, with what the certificate was made of; one that was read from JSON needs
        them. `cache` is that of `certify`, and has to be the same.

        Returns:
            The new certificate.

        Raises:
            ArgumentError: arguments are missing.
            CertificateError: another anchor, delta, data or loss, or a larger bound.
        """
        if self._made_of is not None:
            made = self._made_of
            tangent = made.tangent if tangent is None else tangent
            data = made.data if data is None else data
            delta = made.delta if delta is None else delta
            loss = made.loss if loss is None else loss
            cache = made.cache if cache is None else cache
        if tangent is None or data is None or delta is None:
            raise ArgumentError(
                "verify needs tangent, data and delta, for a certificate that was read from JSON, "
                "or that was made without the data"
            )
        fresh = certify(
            tangent,
            data,
            self.l2,
            delta,
            loss=loss,
            batch_size=batch_size,
            cache=cache or False,
            progress=progress,
        )
        for name in ("anchor", "delta", "loss", "samples", "data", "method"):
            claimed, found = getattr(self, name), getattr(fresh, name)
            if claimed is not None and claimed != found:
                raise CertificateError(f"the certificate is for another {name}: {claimed}, {found}")
        size = sum(float(value.double().square().sum()) for value in delta.values()) ** 0.5
        allowed = self.distance_bound * (1 + ROUNDING) + ROUNDING_OF_SIZE * size
        if not fresh.distance_bound <= allowed:
            raise CertificateError(
                f"the certificate claims a distance of {self.distance_bound:.6g} at most; what "
                f"can be shown is {fresh.distance_bound:.6g}"
            )
        return fresh

    def to_json(self) -> str:
        """Everything but what it was made of."""
        record = asdict(replace(self, _made_of=None))
        del record["_made_of"]
        return json.dumps(record, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read what `to_json` gave.

        Raises:
            ArgumentError: it is something else.
        """
        try:
            record: dict[str, Any] = json.loads(text)
            return cls(**{**record, "assumes": tuple(record["assumes"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ArgumentError(f"text is no certificate's JSON: {error}") from error


@dataclass(frozen=True)
class _MadeOf:
    tangent: LinearizedModel
    data: Data
    delta: Delta
    loss: Loss | None
    cache: bool | str | os.PathLike[str]


def certify(
    tangent: LinearizedModel,
    data: Data,
    l2: float,
    delta: Mapping[str, Tensor] | None = None,
    *,
    loss: Loss | None = None,
    batch_size: int = 64,
    cache: bool | str | os.PathLike[str] = False,
    progress: bool = True,
) -> Certificate:
    """Bound the distance of a delta from the optimum of `fit_exact`'s problem on these data.

    One pass over the data in float64, with a copy of the model.

    Args:
        tangent: the model.
        data: as in `fit_exact`.
        l2: as in `fit_exact`.
        delta: the delta; None for the model's own.
        loss: as in `fit_exact`.
        batch_size: of a Dataset.
        cache: as in `fit_exact`; the cached part is computed in the model's own precision.
        progress: show a bar while features are cached.

    Raises:
        ArgumentError: as in `fit_exact`.
        DeltaError: the delta does not fit the model.
    """
    delta = tangent.delta_dict() if delta is None else delta
    own = Problem(tangent, data, l2, loss, batch_size=batch_size, cache=cache, progress=progress)
    problem = own.in_double()
    _, gradient, _ = problem.gradient(problem.layout.flat(delta))
    size = norm(gradient)
    kept = Delta({name: value.detach().clone() for name, value in delta.items()})
    return Certificate(
        distance_bound=size / problem.l2,
        gradient_norm=size,
        l2=problem.l2,
        samples=problem.samples,
        loss=loss_name(problem.loss),
        method=METHOD if cache is False else METHOD + CACHED,
        assumes=(
            "the loss is convex in the logits",
            "the anchor does not depend on data that are not among these",
        ),
        anchor=tangent.fingerprint,
        delta=fingerprint(kept),
        data=own.data_sha256,
        _made_of=_MadeOf(tangent, data, kept, loss, cache),
    )
