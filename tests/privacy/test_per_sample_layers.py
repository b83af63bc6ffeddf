"""Per-sample gradients of single layers, their options and subclasses."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from per_sample_oracle import Row, check
from small_models import moved, shaken
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.layer_scale import LayerScale
from timm.layers.norm import GroupNorm1, LayerNorm2d
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from tangent_ops import linearize
from tangent_ops.errors import UnsupportedError
from tangent_ops.privacy.per_sample.gradients import PerSampleGradients
from tangent_ops.privacy.per_sample.layers import ProductLayer, make_layer


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["linear", "no bias", "layer norm", "bare norm", "scale", "group norm"]),
    count=st.integers(1, 4),
    middle=st.lists(st.integers(1, 9), max_size=2),
    width=st.integers(1, 8),
    out=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_layers(kind, count, middle, width, out, seed):
    torch.manual_seed(seed)
    shape = [4, 2 * width] if kind == "group norm" else [*middle, 2 * width]
    layer = {
        "linear": lambda: nn.Linear(2 * width, out),
        "no bias": lambda: nn.Linear(2 * width, out, bias=False),
        "layer norm": lambda: nn.LayerNorm(2 * width),
        "bare norm": lambda: nn.LayerNorm(2 * width, bias=False),
        "scale": lambda: LayerScale(2 * width),
        "group norm": lambda: nn.GroupNorm(2, 4),
    }[kind]()
    tangent = moved(linearize(Row(shaken(layer, 0.3)).double()), seed)
    check(tangent, torch.randn(count, *shape, dtype=torch.float64), 1e-9)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from([1, 2, 3]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    groups=st.sampled_from([1, 2]),
    size=st.integers(3, 6),
    seed=st.integers(0, 99),
)
def test_convolutions(kind, kernel, stride, padding, groups, size, seed):
    torch.manual_seed(seed)
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[kind - 1]
    layer = make(2, 4, kernel, stride, padding, groups=groups)
    tangent = moved(linearize(Row(layer).double()), seed)
    inputs = torch.randn(3, 2, *(size + k for k in range(kind)), dtype=torch.float64)
    check(tangent, inputs, 1e-9)


class ChannelsFirst(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Squared(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias).square()


class Centring(nn.Conv2d):
    """The base's forward calls this, too."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Factored(nn.Linear):
    """Keeps the base's forward, with a weight that is computed from other parameters."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__(size, out)
        direction = self.weight
        del self.weight  # pyright: ignore[reportAttributeAccessIssue]
        self.direction, self.length = direction, nn.Parameter(torch.ones(out, 1))

    @property
    def weight(self) -> Tensor:
        return self.length * self.direction


class Halved(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class Renamed(nn.Linear):
    """A subclass that computes what its base does."""


def set_on_the_instance() -> nn.Module:
    layer = nn.Linear(5, 3)
    sine = types.MethodType(lambda self, x: torch.sin(F.linear(x, self.weight, self.bias)), layer)
    setattr(layer, "forward", sine)  # noqa: B010
    return layer


SUBCLASSES = {
    "timm's LayerNorm2d": lambda: LayerNorm2d(4),
    "timm's Conv2dSame": lambda: Conv2dSame(4, 3, 3, 2),
    "timm's StdConv2d": lambda: StdConv2d(4, 3, 3),
    "timm's StdConv2dSame": lambda: StdConv2dSame(4, 3, 3, 2),
    "timm's ScaledStdConv2d": lambda: ScaledStdConv2d(4, 3, 3),
    "timm's GroupNorm1": lambda: GroupNorm1(4),
    "channels-first linear": lambda: ChannelsFirst(4, 3),
    "squared linear": lambda: Squared(5, 3),
    "convolution of a centred weight": lambda: Centring(4, 3, 3),
    "linear of a factored weight": lambda: Factored(5, 3),
    "halved layer norm without bias": lambda: Halved(5, bias=False),
    "renamed linear": lambda: Renamed(5, 3),
    "forward of the instance": set_on_the_instance,
    "reflected padding": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    "circular padding": lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular", groups=2),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_subclasses_and_options_of_known_layers(name):
    torch.manual_seed(0)
    layer = shaken(SUBCLASSES[name](), 0.3)
    tangent = moved(linearize(Row(layer).double()))
    check(tangent, torch.randn(3, 4, 6, 5, dtype=torch.float64), 1e-9)


def test_a_subclass_that_computes_what_its_base_does_is_not_run_anew():
    names = {"weight": "w", "bias": "b"}
    assert isinstance(make_layer(Renamed(6, 3), names, {}), ProductLayer)
    assert not isinstance(make_layer(Squared(6, 3), names, {}), ProductLayer)


class DataDependent(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if bool(input.sum() < 1e9) else input


def test_a_layer_that_functorch_cannot_map_is_named():
    tangent = linearize(Row(DataDependent(6, 3)))
    with pytest.raises(UnsupportedError, match=r"of a DataDependent need functorch.*`trainable`"):
        PerSampleGradients(tangent, torch.randn(2, 6))
