"""Per-sample gradients of parameters that `layers` does not cover, such as class tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_ops.errors import UnsupportedError
from tangent_ops.family import family_of
from tangent_ops.model.eval_caches import Kept
from tangent_ops.ops.factored import Factors
from tangent_ops.ops.levels import functional_call


class Whole:
    """Gradients through the whole anchor, by functorch, at the cost of one more ordinary pass.

    Args:
        anchor: the model at w0.
        names: of the parameters.
        factors: of those with deltas in factors, by name.
        kept: the anchor's eval caches.
    """

    def __init__(
        self, anchor: nn.Module, names: list[str], factors: Mapping[str, Factors], kept: Kept
    ) -> None:
        self.names = names
        self._anchor = anchor
        self._family = family_of(anchor)
        self._kept = kept
        self._weights = {name: anchor.get_parameter(name).detach() for name in names}
        self._factors = {name: each for name, each in factors.items() if name in names}

    def samples(self, inputs: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        """Per-sample gradients of the deltas by name, (n, ...).

        Raises:
            UnsupportedError: functorch cannot map the model over samples.
        """

        def output(weights: dict[str, Tensor], one: Tensor, cotangent: Tensor) -> Tensor:
            with self._kept.nothing():
                output = functional_call(self._anchor, weights, (one[None],))
                logits = self._family.logits(output)
            return (logits[0] * cotangent).sum()

        try:
            # Attention's other backends have no rule for vmap.
            with sdpa_kernel(SDPBackend.MATH), _without_autocast(inputs):
                found = vmap(grad(output), (None, 0, 0))(self._weights, inputs, cotangents)
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedError(
                f"per-sample gradients of {', '.join(self.names)} need functorch, which cannot map "
                f"this model over samples ({error}). Leave them out of `trainable`"
            ) from error
        return {name: self._of_delta(name, value) for name, value in found.items()}

    def weighted_sums(
        self, inputs: Tensor, cotangents: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Σ_i w_i G_i by name, shaped as the deltas, without any G_i."""
        leaves = {name: value.requires_grad_() for name, value in self._fresh().items()}
        with torch.enable_grad(), _without_autocast(inputs), self._kept.nothing():
            logits = self._family.logits(functional_call(self._anchor, leaves, (inputs,)))
        shape = (-1,) + (1,) * (cotangents.ndim - 1)
        scaled = (cotangents * weights.view(shape)).to(logits.dtype)
        found = torch.autograd.grad(logits, list(leaves.values()), scaled)
        return {
            name: self._of_delta(name, value[None])[0]
            for name, value in zip(leaves, found, strict=True)
        }

    def _fresh(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self._weights.items()}

    def _of_delta(self, name: str, samples: Tensor) -> Tensor:
        if name not in self._factors:
            return samples
        return self._factors[name].gradient(samples.flatten(2))


def _without_autocast(inputs: Tensor) -> torch.autocast:
    return torch.autocast(inputs.device.type, enabled=False)
