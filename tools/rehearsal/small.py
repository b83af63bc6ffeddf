"""A rehearsed GPU check is small, its numbers are muted: in a process, or as pytest's plugin."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from tangent_kernels import timing
from tangent_kernels.attention import configs

from benchmarks import bench_attention, bench_layers, measure, roofline
from tangent_ops.cli import profile_options
from tangent_ops.model import check_derivatives
from tools import rehearsal

create_model = timm.create_model


@pytest.hookimpl(tryfirst=True)  # before the benchmarks look for a device
def pytest_configure() -> None:
    make_small()


class FirstAlone(tuple):
    """The tuner goes over the first kernel alone, and knows the others."""

    def __iter__(self) -> Iterator[Any]:
        yield self[0]


def make_small() -> None:
    """Start the rehearsal in this process, with small shapes and models."""
    rehearsal.start(compiled=False)
    rehearsal.CudaNames().__enter__()
    memory = itertools.count(0, 1 << 20)
    torch.cuda.memory_allocated = lambda device=None: next(memory)
    torch.Tensor.isfinite = lambda self: torch.ones_like(self, dtype=torch.bool)
    torch.compile = lambda function, **options: function  # type: ignore[assignment]
    timm.create_model = _small_model
    measure.relative_error = _no_error
    check_derivatives._refuse = lambda side, lost: None
    profile_options._device = lambda name: "cpu"  # the profiler would ask CUDA itself for times
    measure.MOST_OPERANDS, measure.SECONDS = 3, 1e-3
    timing.MOST = 4
    roofline.LARGE = dict.fromkeys(roofline.LARGE, (1 << 10, 16))
    bench_attention.HOME = [(2, 2, 20, 64), (1, 2, 30, 128)]
    bench_layers.VIT_BASE = (40, 48, 96)
    bench_layers.LAYERS = {name: bench_layers.LAYERS[name] for name in ("gelu", "linear")}
    configs.DIRECTIONS, configs.TRIED = FirstAlone(configs.DIRECTIONS), 3


def _small_model(name: str, **options: Any) -> Any:
    """Whatever the name, a transformer of width 64, for images of four patches."""
    model: Any = create_model("test_vit", img_size=32, **options)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    return model


def _no_error(found: Any, exact: Any) -> float:
    for one, true in zip(found, exact, strict=False):
        assert one.shape == true.shape
    return 0.0
