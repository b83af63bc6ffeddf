"""Per-sample gradients of a tangent model's deltas, clipped and summed, in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tangent_ops.errors import ArgumentError, NonFiniteLossError, UnsupportedError
from tangent_ops.exact.jacobian import Jacobian
from tangent_ops.family import logits_of
from tangent_ops.losses import Loss, MeanOfSamples, RescaledSquareLoss, loss_gradient
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.privacy.per_sample.layers import Layer, make_layer
from tangent_ops.privacy.per_sample.taps import Pass
from tangent_ops.privacy.per_sample.whole import Whole

MODES = ("bookkeeping", "ghost", "per-sample")
PROBES = 3
ROUNDING = 100.0  # units in the last place that a norm may be too small by


class PerSampleGradients:
    """Gradients J(x_i)ᵀ c_i of the deltas; c_i is the gradient of sample i's loss by its logits.

    J(x_i)ᵀ c_i is the anchor's vector-Jacobian product, so the methods for ordinary models apply to
    one forward and backward pass of the tangent model. The constructor compares the result on noise
    with one sample at a time, and so detects models that mix samples, or that use a layer's
    parameters outside the layer.

    Args:
        tangent: the model; its deltas are read, and never changed.
        example: (n, ...), floating point, of the shape (but for n), dtype and device of later
            inputs; its values do not matter.

    Raises:
        ArgumentError: example is not floating point.
        UnsupportedError: the model uses checkpointing, or a parameter's per-sample gradients cannot
            be computed; the error names it.
    """

    def __init__(self, tangent: LinearizedModel, example: Tensor) -> None:
        if not example.is_floating_point():
            raise ArgumentError(
                f"per-sample gradients need floating-point inputs, got {example.dtype}"
            )
        if tangent.grad_checkpointing:
            raise UnsupportedError(
                "per-sample gradients do not work with checkpointing: call "
                "set_grad_checkpointing(False), and use smaller physical batches instead"
            )
        self._tangent = tangent
        noise = torch.Generator().manual_seed(0)
        probes = torch.randn((PROBES, *example.shape[1:]), generator=noise).to(example)
        self._layers, self._modules = self._covered(probes)
        covered = {name for layer in self._layers.values() for name in layer.names.values()}
        rest = [name for name in tangent.deltas() if name not in covered]
        factors = tangent.factors()
        self._whole = Whole(tangent.anchor, rest, factors, tangent.kept) if rest else None
        self._verify(probes)

    def clipped_sum(
        self,
        inputs: Tensor,
        targets: Tensor,
        loss: Loss,
        max_grad_norm: float,
        mode: str = "bookkeeping",
    ) -> dict[str, Tensor]:
        """Σ_i g_i min(1, C / ‖g_i‖) by name, shaped as the deltas.

        Args:
            inputs: (n, ...), n >= 1.
            targets: (n, ...).
            loss: a mean of the samples' losses.
            max_grad_norm: C, in the Euclidean norm over all deltas together.
            mode: "bookkeeping": one backward pass; the layers' cotangents are kept. "ghost": two
                backward passes; nothing is kept. Neither stores the gradients of single samples.
                "per-sample": one backward pass; these gradients, n times the size of the deltas,
                are kept.

        Raises:
            NonFiniteLossError: a gradient is NaN or infinite.
        """
        forward = Pass(self._tangent, self._modules, inputs)
        _, gradient = loss_gradient(loss, forward.logits, targets)

        def factors(squares: Tensor) -> Tensor:
            return clip_factors(squares.sqrt(), max_grad_norm)

        return self._weighted(forward, inputs, len(inputs) * gradient, factors, mode)

    def samples(self, inputs: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        """J(x_i)ᵀ c_i by name, (n, ...), for c shaped as the logits."""
        return self._samples(Pass(self._tangent, self._modules, inputs), inputs, cotangents)

    def _weighted(
        self,
        forward: Pass,
        inputs: Tensor,
        cotangents: Tensor,
        weigh: Callable[[Tensor], Tensor],
        mode: str,
    ) -> dict[str, Tensor]:
        """Σ_i w_i J(x_i)ᵀ c_i; `weigh` gives w (n,) for the squared norms of J(x_i)ᵀ c_i."""
        if mode == "per-sample":
            samples = self._samples(forward, inputs, cotangents)
            weights = weigh(_squared_norms(samples, len(inputs)))
            sums = {n: torch.tensordot(weights.to(s.dtype), s, 1) for n, s in samples.items()}
            return self._filled(sums)
        squares = torch.zeros(len(inputs), device=inputs.device)
        if self._whole is not None:
            squares = squares + _squared_norms(self._whole.samples(inputs, cotangents), len(inputs))
        seen: dict[str, Tensor] = {}

        def norms(name: str, activations: Tensor, cotangent: Tensor) -> None:
            nonlocal squares
            squares = squares + self._layers[name].squared_norms(activations, cotangent)
            if mode == "bookkeeping":
                seen[name] = cotangent

        self._back(forward, cotangents, norms, again=mode == "ghost")
        weights = weigh(squares)
        sums: dict[str, Tensor] = {}

        def add(name: str, activations: Tensor, cotangent: Tensor, scale: Tensor) -> None:
            sums.update(self._layers[name].weighted_sums(activations, cotangent, scale))

        if mode == "ghost":
            # The cotangents are weighted already.
            ones = torch.ones_like(weights)
            self._back(forward, _scaled(cotangents, weights), partial(add, scale=ones))
        else:
            for name in list(seen):
                add(name, forward.activations(name), seen.pop(name), weights)
        if self._whole is not None:
            sums |= self._whole.weighted_sums(inputs, cotangents, weights)
        return self._filled(sums)

    def _samples(self, forward: Pass, inputs: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        found = {} if self._whole is None else self._whole.samples(inputs, cotangents)

        def keep(name: str, activations: Tensor, cotangent: Tensor) -> None:
            found.update(self._layers[name].samples(activations, cotangent))

        self._back(forward, cotangents, keep)
        return found

    def _back(
        self,
        forward: Pass,
        cotangents: Tensor,
        use: Callable[[str, Tensor, Tensor], None],
        *,
        again: bool = False,
    ) -> None:
        for name in self._layers:
            seen = forward.seen(name)
            seen.receive = lambda cotangent, name=name, seen=seen: use(
                name, seen.activations, cotangent
            )
        forward.back(cotangents, again=again)

    def _filled(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums in the deltas' dtypes; zeros for deltas that the logits do not depend on."""
        return {
            name: sums[name].to(delta.dtype) if name in sums else torch.zeros_like(delta.detach())
            for name, delta in self._tangent.deltas().items()
        }

    def _covered(self, probes: Tensor) -> tuple[dict[str, Layer], dict[str, nn.Module]]:
        """Layers that are called once, with one tensor in and out, and share no parameter."""
        anchor, factors = self._tangent.anchor, self._tangent.factors()
        owners = Counter(id(p) for _, p in anchor.named_parameters(remove_duplicate=False))
        owned: dict[str, dict[str, str]] = {}
        for name in self._tangent.deltas():
            path, _, own = name.rpartition(".")
            owned.setdefault(path, {})[own] = name
        layers, modules = {}, {}
        for path, names in owned.items():
            module = anchor.get_submodule(path)
            shared = any(owners[id(module._parameters[own])] > 1 for own in names)
            if shared or any(True for _ in module.children()):
                continue
            own_factors = {own: factors[name] for own, name in names.items() if name in factors}
            try:
                layers[path] = make_layer(module, names, own_factors)
            except NotImplementedError:  # e.g. it has buffers, and Opacus has no sampler for it
                continue
            modules[path] = module
        calls = Pass(self._tangent, modules, probes).calls
        fits = [
            path
            for path, seen in calls.items()
            if len(seen) == 1
            and seen[0] is not None
            and seen[0].activations.shape[:1] == seen[0].output[:1] == probes.shape[:1]
        ]
        return {path: layers[path] for path in fits}, {path: modules[path] for path in fits}

    def _verify(self, probes: Tensor) -> None:
        """Compare norms and sums with those of one sample at a time, on noise."""
        forward = Pass(self._tangent, self._modules, probes)
        noise = torch.Generator().manual_seed(1)
        cotangents = torch.randn(forward.logits.shape, generator=noise).to(forward.logits)
        weights = torch.tensor([1.0, -0.5, 2.0]).to(cotangents)
        squares = torch.empty(0)

        def weigh(found: Tensor) -> Tensor:
            nonlocal squares
            squares = found.double()
            return weights

        sums = self._weighted(forward, probes, cotangents, weigh, "bookkeeping")
        jacobian = Jacobian(self._tangent)
        right = {name: torch.zeros_like(value) for name, value in sums.items()}
        norms = []
        for one, cotangent, weight in zip(
            probes.split(1), cotangents.split(1), weights.tolist(), strict=True
        ):
            parts = jacobian.pull_back(
                jacobian.layout.zeros(), one, lambda *_, cotangent=cotangent: cotangent
            )
            norms.append(sum(float(part.double().square().sum()) for part in parts))
            for name, part in zip(right, parts, strict=True):
                right[name].add_(part, alpha=weight)
        _compare(sums, right, squares, norms, probes.dtype)


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, C / ‖g_i‖), slightly reduced, so that no gradient exceeds C by a norm's rounding.

    Raises:
        NonFiniteLossError: a norm is NaN or infinite.
    """
    if not norms.isfinite().all():
        raise NonFiniteLossError(
            "the gradient of a sample is not finite: check the inputs for NaN, and a 16-bit model "
            "for overflow"
        )
    slack = 1 + ROUNDING * torch.finfo(norms.dtype).eps
    return (max_grad_norm / (norms * slack).clamp_min(1e-30)).clamp_max(1.0)


def per_sample_gradients(
    tangent: LinearizedModel, inputs: Tensor, targets: Tensor, loss: Loss | None = None
) -> dict[str, Tensor]:
    """The gradient of each sample's loss by the deltas, from one forward and backward pass.

    Args:
        tangent: the model.
        inputs: (n, ...).
        targets: (n, ...).
        loss: a mean of the samples' losses; None for `RescaledSquareLoss()`.

    Returns:
        Name -> (n, ...), n times the size of the deltas.

    Raises:
        ArgumentError: inputs are not floating point; loss is no such mean.
        UnsupportedError: as `PerSampleGradients`.
    """
    own = PerSampleGradients(tangent, inputs)
    with torch.no_grad():
        logits = logits_of(tangent, inputs)
    loss = loss or RescaledSquareLoss()
    MeanOfSamples(loss, logits, targets).check(targets)
    _, gradient = loss_gradient(loss, logits, targets)
    samples = own.samples(inputs, len(inputs) * gradient)
    missing = {
        name: delta.detach().new_zeros((len(inputs), *delta.shape))
        for name, delta in tangent.deltas().items()
        if name not in samples
    }
    return {name: (samples | missing)[name] for name in tangent.deltas()}


def _squared_norms(samples: dict[str, Tensor], count: int) -> Tensor:
    squares = [s.flatten(1).square().sum(1) for s in samples.values()]
    return torch.stack(squares).sum(0) if squares else torch.zeros(count)


def _scaled(cotangents: Tensor, weights: Tensor) -> Tensor:
    return cotangents * weights.to(cotangents.dtype).view(-1, *(1,) * (cotangents.ndim - 1))


def _compare(
    sums: dict[str, Tensor],
    right: dict[str, Tensor],
    squares: Tensor,
    norms: list[float],
    dtype: torch.dtype,
) -> None:
    """Raise UnsupportedError, naming the parameter that is off most."""
    tolerance = 3 * torch.finfo(dtype).eps ** 0.5
    whole = sum(float(value.double().square().sum()) for value in right.values()) ** 0.5
    off = {
        name: float((sums[name] - value).double().norm())
        / (float(value.double().norm()) + 0.01 * whole + 1e-30)
        for name, value in right.items()
    }
    worst = max(off, key=lambda name: off[name])
    exact = torch.tensor(norms, dtype=torch.float64, device=squares.device)
    wrong = float(((squares - exact).abs() / (exact + 1e-30)).max())
    if not (off[worst] <= tolerance and wrong <= 2 * tolerance):
        raise UnsupportedError(
            "per-sample gradients from this model's layers are wrong: on noise, those of "
            f"{worst} differ by {off[worst]:.1e} from one sample at a time, and squared norms by "
            f"{wrong:.1e}. The model mixes samples, or uses a layer's parameters outside the "
            "layer: leave them out of `trainable`"
        )
