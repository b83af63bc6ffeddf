"""Small models for tests of whole-model code, and their independent float64 oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tangent_ops import LinearizedModel
from tests.ops.oracle import double

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}

SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 2),
        "num_heads": (2, 3)}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 2, size: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=generator(seed))


def shaken(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """The model with noise on all parameters, many of which start as zeros or ones."""
    noise = generator(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=noise))
    return model


def vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**{**VIT, "num_classes": 5, "init_values": 1.0, **options})
    shaken(model)
    return model


class Computes(nn.Module):
    """Layers and parameters by name; its forward is `call(module, x)`."""

    def __init__(self, call: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


class NoJvp(torch.autograd.Function):
    """Doubles its input, and has no forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def tiny_vit(seed: int = 0, **options) -> VisionTransformer:
    """A ViT with the weights that timm initializes it with, drawn from that seed."""
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return VisionTransformer(**{**sizes, "num_classes": 5, **options})


def levit() -> nn.Module:
    """A LeViT, whose attention caches tensors in eval mode, in float64.

    The gradients of its attention biases are small: float32 would leave four digits of them.
    """
    options = {"embed_dim": (32,), "num_heads": (2,), "key_dim": 16, "depth": (2,)}
    return family("levit_128s", img_size=32, **options).double()


class Mlp(nn.Module):
    """A fast model for tests that do not depend on the architecture."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))


def rows(count: int = 5) -> Tensor:
    """Inputs for `Mlp`."""
    return torch.randn(count, 4, generator=generator(5))


def family(name: str, **options) -> nn.Module:
    """A timm architecture, small, with random weights."""
    torch.manual_seed(0)
    return shaken(timm.create_model(name, num_classes=5, **options))


def swin(**options) -> nn.Module:
    return family("swin_tiny_patch4_window7_224", **{**SWIN, **options})


def moved(tangent: LinearizedModel, seed: int = 3, scale: float = 0.05) -> LinearizedModel:
    """The tangent model with random deltas."""
    noise = generator(seed)
    with torch.no_grad():
        for delta in tangent.deltas().values():
            delta.copy_(scale * torch.randn(delta.shape, generator=noise))
    return tangent


class RightLayerNorm(TorchFunctionMode):
    """Recomposes F.layer_norm: PyTorch silently treats mean and deviation as constants in
    derivatives of its tangent by x."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (_layer_norm if func is F.layer_norm else func)(*args, **(kwargs or {}))


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    dims = tuple(range(-len(shape), 0))
    deviation, mean = torch.std_mean(x, dims, correction=0, keepdim=True)
    output = (x - mean) / (deviation.square() + eps).sqrt()
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


def oracle(model: nn.Module) -> Callable[..., Callable[..., Any]]:
    """The model in eval mode and float64, as ``run(*inputs)(weights)``."""
    exact = copy.deepcopy(model).double().eval()

    def run(*args, **kwargs):
        def of_weights(weights):
            with sdpa_kernel(SDPBackend.MATH), RightLayerNorm():
                return functional_call(exact, weights, double(args), double(kwargs))

        return of_weights

    return run


def exact_jvp(model: nn.Module, deltas: dict[str, Tensor], *args, **kwargs) -> tuple[Any, Any]:
    """f(x; w0) and J(x) Δw by torch.func.jvp in float64."""
    tangents = double({name: delta.detach() for name, delta in deltas.items()})
    weights = double({n: p.detach() for n, p in model.named_parameters() if n in tangents})
    return torch.func.jvp(oracle(model)(*args, **kwargs), (weights,), (tangents,))


def exact_input_jvp(
    model: nn.Module, x: tuple[Tensor, ...], x_t: tuple[Tensor, ...], **kwargs
) -> tuple[Any, Any]:
    """f(x; w0) and its tangent along x_t by torch.func.jvp in float64."""
    run = oracle(model)
    return torch.func.jvp(lambda *x: run(*x, **kwargs)({}), double(x), double(x_t))


def exact_vjp(
    model: nn.Module, names: list[str], cotangent: Tensor, *args, **kwargs
) -> dict[str, Tensor]:
    """Jᵀ(x) times ``cotangent``, by name, by torch.func.vjp in float64."""
    weights = double({n: p.detach() for n, p in model.named_parameters() if n in names})
    _, pull_back = torch.func.vjp(oracle(model)(*args, **kwargs), weights)
    return pull_back(cotangent.double())[0]


def assert_near(found: Any, exact: Any, tolerance: float = 2e-5) -> None:
    """Every tensor is within ``tolerance`` of the float64 one, relative to its largest entry.

    float32 rounds at 6e-8; a few hundred operations in a row lose two digits of that.
    """
    leaves = [[x.detach() for x in tree_leaves(value)] for value in (found, exact)]
    pairs = list(zip(*leaves, strict=True))
    assert pairs
    for one, right in pairs:
        assert one.shape == right.shape
        assert float(right.abs().max()) > 0  # two zeros would always agree
        assert float((one - right).abs().max()) <= tolerance * float(right.abs().max())


def assert_exact(tangent: LinearizedModel, model: nn.Module, x: Tensor) -> None:
    """Value, tangent and gradients of the tangent model are those of ``model`` in float64."""
    deltas = tangent.deltas()
    assert_near(tangent.primal_and_tangent(x), exact_jvp(model, deltas, x))
    output = tangent(x)
    cotangent = torch.randn(output.shape, generator=generator(2))
    grads = torch.autograd.grad(output, list(deltas.values()), cotangent)
    exact = exact_vjp(model, list(deltas), cotangent, x)
    assert_near(dict(zip(deltas, grads, strict=True)), exact)
