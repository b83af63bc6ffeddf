"""Per-sample gradients of one layer, from its input and the cotangent of its output.

A layer's gradient is a sum of products over the positions t of a sample (tokens, patches). For
linear layers and convolutions it is G = Σ_t g_t a_tᵀ, so that

    ‖G‖² = Σ_{t,t'} (a_t · a_t') (g_t · g_t')          Σ_i w_i G_i = Σ_{i,t} w_i g_it a_itᵀ

The first needs no G ("ghost norm": Li, Tramèr, Liang, Hashimoto, "Large Language Models Can Be
Strong Differentially Private Learners", ICLR 2022, section 4), the second is one product
("book-keeping": Bu, Wang, Zha, Karypis, "Differentially Private Optimization on Large Model at
Small Cost", ICML 2023). Gradients of other layers come from Opacus' grad samplers or functorch.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer
from torch import Tensor, nn

from tangent_ops.errors import UnsupportedError
from tangent_ops.losses import at_least_single
from tangent_ops.ops.factored import Factors

CHUNK = 1 << 22  # entries of per-sample gradients in memory at a time, for norms and sums
ROUNDING = 4.0  # units in the last place of |a| |g| that sums over positions may be off by

COMPUTING = ("forward", "_conv_forward")  # the methods that compute an output

Sampler = Callable[[nn.Module, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]


def make_layer(
    module: nn.Module, names: Mapping[str, str], factors: Mapping[str, Factors]
) -> Layer:
    """The per-sample gradients of a module's own parameters.

    Args:
        module: of the anchor.
        names: of its trained parameters: its own name of each -> the delta's name.
        factors: of those with deltas in factors, by its own name of each.

    Raises:
        NotImplementedError: neither Opacus nor functorch supports the module.
    """
    product = _computes_as(module, nn.Linear) or (
        _computes_as(module, nn.Conv2d)
        and module.groups == 1
        and not isinstance(module.padding, str)
    )
    return (ProductLayer if product else Layer)(module, names, factors)


def _computes_as(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is of a kind, and computes the same function as that kind."""
    same = (getattr(type(layer), n, None) is getattr(kind, n, None) for n in COMPUTING)
    return (
        isinstance(layer, kind)
        and all(same)
        and layer._parameters.keys() <= {"weight", "bias"}
        and "forward" not in vars(layer)
        and getattr(layer, "padding_mode", "zeros") == "zeros"  # Opacus ignores others
    )


class Layer:
    """Any layer: forms per-sample gradients, some samples at a time."""

    def __init__(
        self, module: nn.Module, names: Mapping[str, str], factors: Mapping[str, Factors]
    ) -> None:
        self.names = dict(names)
        self.factors = dict(factors)
        self._layer = _stand_in(module, names)
        self._sample = _sampler(module) or _functorch(module, self._layer)
        self._size = sum(p.numel() for p in self._layer.parameters() if p.requires_grad)

    def samples(self, activations: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        """The deltas' per-sample gradients by name, (n, ...).

        Args:
            activations: input of the layer, (n, ...).
            cotangent: of its output, (n, ...).
        """
        activations, cotangent = at_least_single(activations), at_least_single(cotangent)
        found = self._sample(self._layer, [activations], cotangent)
        gradients = {
            own: found[parameter].detach()
            for own, parameter in self._layer._parameters.items()
            if own in self.names and parameter is not None
        }
        return {name: self._of_delta(own, gradients[own]) for own, name in self.names.items()}

    def squared_norms(self, activations: Tensor, cotangent: Tensor) -> Tensor:
        """‖G_i‖² over all parameters of the layer, (n,)."""
        count = max(1, CHUNK // max(1, self._size))
        chunks = zip(activations.split(count), cotangent.split(count), strict=True)
        return torch.cat([_squared_norms(self.samples(a, g)) for a, g in chunks])

    def weighted_sums(
        self, activations: Tensor, cotangent: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Σ_i w_i G_i by name, shaped as the deltas; weights are (n,)."""
        count = max(1, CHUNK // max(1, self._size))
        sums: dict[str, Tensor] = {}
        for a, g, w in zip(
            activations.split(count), cotangent.split(count), weights.split(count), strict=True
        ):
            for name, samples in self.samples(a, g).items():
                part = torch.tensordot(w.to(samples.dtype), samples, 1)
                sums[name] = sums[name] + part if name in sums else part
        return sums

    def _of_delta(self, own: str, samples: Tensor) -> Tensor:
        """The gradients of the trained factor; unchanged for a full delta."""
        if own not in self.factors:
            return samples
        return self.factors[own].gradient(samples.flatten(2))


class ProductLayer(Layer):
    """A linear layer, or a convolution of one group: G = Σ_t g_t a_tᵀ."""

    def squared_norms(self, activations: Tensor, cotangent: Tensor) -> Tensor:
        a, g = self._factors(activations, cotangent)
        squares = g.new_zeros(len(g))
        if "bias" in self.names:
            squares += g.sum(1).square().sum(1)
        if "weight" in self.names:
            a, g = self._of_weight(a, g)
            positions, size = a.shape[1], a.shape[2] * g.shape[2]
            gram = positions * (a.shape[2] + g.shape[2]) <= size
            squares += _gram_norms(a, g) if gram else _product_norms(a, g)
        return squares

    def weighted_sums(
        self, activations: Tensor, cotangent: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        a, g = self._factors(activations, cotangent)
        g = g * weights.to(g.dtype)[:, None, None]
        sums = {}
        if "bias" in self.names:
            sums[self.names["bias"]] = g.sum((0, 1))
        if "weight" in self.names:
            a, g = self._of_weight(a, g)
            product = g.flatten(0, 1).T @ a.flatten(0, 1)
            weight = self._layer.get_parameter("weight")
            in_factors = "weight" in self.factors
            sums[self.names["weight"]] = product if in_factors else product.view(weight.shape)
        return sums

    def _factors(self, activations: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """a (n, T, in) and g (n, T, out)."""
        a, g = at_least_single(activations), at_least_single(cotangent)
        layer = self._layer
        if isinstance(layer, nn.Conv2d):
            geometry = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            a = F.unfold(a, *geometry).mT  # pyright: ignore[reportArgumentType]
            g = g.flatten(2).mT
        else:
            a = a.reshape(len(a), -1, a.shape[-1])
            g = g.reshape(len(g), -1, g.shape[-1])
        return a, g

    def _of_weight(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the weight's delta, whose fixed factors reduce them."""
        factors = self.factors.get("weight")
        if factors is None:
            return a, g
        return a @ factors.right.T, g if factors.left is None else g @ factors.left


def _gram_norms(a: Tensor, g: Tensor) -> Tensor:
    """‖Σ_t g_t a_tᵀ‖² from Gram matrices; rounding never makes it too small."""
    inputs, outputs = a @ a.mT, g @ g.mT
    # Terms of several positions can cancel; the rounding error is relative to their sizes.
    size = inputs.diagonal(dim1=1, dim2=2).sum(1) * outputs.diagonal(dim1=1, dim2=2).sum(1)
    slack = ROUNDING * torch.finfo(a.dtype).eps * size
    return inputs.mul_(outputs).sum((1, 2)).clamp_min(0) + slack


def _product_norms(a: Tensor, g: Tensor) -> Tensor:
    """The same from the matrix Σ_t g_t a_tᵀ, some samples at a time."""
    count = max(1, CHUNK // (a.shape[2] * g.shape[2]))
    chunks = zip(a.split(count), g.split(count), strict=True)
    norms = torch.cat([(y.mT @ x).flatten(1).norm(dim=1) for x, y in chunks])
    size = a.flatten(1).norm(dim=1) * g.flatten(1).norm(dim=1)
    return (norms + ROUNDING * torch.finfo(a.dtype).eps * size).square()


def _squared_norms(samples: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([s.flatten(1).square().sum(1) for s in samples.values()]).sum(0)


def _stand_in(module: nn.Module, names: Mapping[str, str]) -> nn.Module:
    """A copy of the module in which only parameters with deltas require a gradient, no hooks."""
    layer = copy.copy(module)
    layer._parameters = {
        own: None if p is None else nn.Parameter(at_least_single(p.detach()), own in names)
        for own, p in module._parameters.items()
    }
    layer._forward_hooks = OrderedDict()
    layer._forward_pre_hooks = OrderedDict()
    return layer


def _sampler(layer: nn.Module) -> Sampler | None:
    """Opacus' sampler for the layer; None if there is none."""
    if isinstance(layer, nn.LayerNorm) and layer.bias is None:  # Opacus' sampler needs a bias
        return None
    known = GradSampleModule.GRAD_SAMPLERS.items()
    return next((sampler for kind, sampler in known if _computes_as(layer, kind)), None)


def _functorch(module: nn.Module, layer: nn.Module) -> Sampler:
    """Functorch's sampler, which runs the class's forward with the stand-in for the module."""
    if "forward" in vars(module):
        raise NotImplementedError("its forward is the instance's own")
    prepare_layer(layer)
    return _by_functorch


def _by_functorch(
    layer: nn.Module, activations: list[Tensor], cotangent: Tensor
) -> dict[nn.Parameter, Tensor]:
    try:
        return ft_compute_per_sample_gradient(layer, activations, cotangent)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedError(
            f"per-sample gradients of a {type(layer).__name__} need functorch, which cannot map "
            f"its forward over samples ({error}). Leave its parameters out of `trainable`"
        ) from error
