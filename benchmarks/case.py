"""What is timed: cases, the providers that answer them, and suites that hold both."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]
Extent = Literal["home", "default", "full"]
Missing = Callable[["Case", torch.device], str | None]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_ON_CPU = "TANGENT_OPS_BENCH_COMPILE"  # environment variable


@dataclass(frozen=True)
class Cost:
    """The least work that answers a question: floating-point operations and bytes of memory."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    group: str  # "attention-forward", "train-step" ...: the name of the test, with dashes
    op: str  # "attention", "layer_norm", a timm model's name ...
    shape: tuple[int, ...]  # in the order that the suite documents
    dtype: str  # a key of DTYPES
    causal: bool = False  # of attention

    def __str__(self) -> str:
        words = [self.op, "x".join(map(str, self.shape)), self.dtype]
        return " ".join([*words, "causal"] if self.causal else words)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Provider:
    """One way to compute a case."""

    name: str  # "ours", "torch-jvp", "sdpa-flash" ...
    answer: Callable[..., Any]  # the decorated function; its suite says what it takes and gives
    groups: Sequence[str] = ()  # that it answers; empty: all
    # What its least work is counted for: "tangent" (value and tangent), "primal" (the value alone),
    # or "finite-differences", which have half the digits.
    question: str = "tangent"
    part: str = "all"  # of a model; or "last" (block, norm and head), "tail" (on cached tokens)
    missing: Missing = lambda case, device: None  # why it cannot run here, or None
    graphed: bool = False  # whether its call is the replay of a CUDA graph


class Suite:
    """Cases of one kind and their providers; the first provider is this library's.

    A subclass says what a case's operands are, how a provider's function becomes a call, and which
    answer is right. A benchmark file has one, as ``SUITE``.
    """

    def __init__(self) -> None:
        self._providers: list[Provider] = []

    def provider(self, name: str, **options: Any) -> Callable[[Callable], Callable]:
        """Registers the decorated function; the options are the attributes of Provider."""

        def register(answer: Callable) -> Callable:
            if any(one.name == name for one in self._providers):
                raise ValueError(f"provider {name!r} is registered twice")
            self._providers.append(Provider(name, answer, **options))
            return answer

        return register

    def providers(self, case: Case) -> list[Provider]:
        """Those that answer the case's group, in the order of registration."""
        return [one for one in self._providers if not one.groups or case.group in one.groups]

    def allowed(self, case: Case, provider: Provider) -> float:
        """The largest relative error of a right answer.

        Finite differences may err 1e4 times as much, or 10 % where that is less.
        """
        bound = self.bound(case)
        return min(1e4 * bound, 0.1) if provider.question == "finite-differences" else bound

    # A subclass defines the rest.

    def cases(self, device: torch.device, extent: Extent) -> Sequence[Case]:
        """The cases that fit the device.

        Those that the targets speak of ("home"), those that take some minutes ("default"), or all;
        a suite that has no home is measured as by default.
        """
        raise NotImplementedError

    def inputs(self, case: Case, device: torch.device, seed: int) -> Any:
        """Random operands."""
        raise NotImplementedError

    def expected(self, case: Case, inputs: Any) -> Outputs:
        """The exact results in float64, or the part of them that can be afforded."""
        raise NotImplementedError

    def compared(self, case: Case, outputs: Outputs) -> Outputs:
        """The part of a provider's results that ``expected`` computes."""
        return outputs

    def prepare(self, provider: Provider, case: Case, inputs: Any) -> Call:
        """The call that is checked, then timed. It gives what ``expected`` gives.

        A provider that computes less, such as plain attention, gives the first tensors.
        """
        raise NotImplementedError

    def bound(self, case: Case) -> float:
        """The relative error, norm over norm, above which an answer is wrong."""
        raise NotImplementedError

    def cost(self, case: Case, provider: Provider) -> Cost:
        """The least work that the provider's question needs."""
        raise NotImplementedError


def compiling_is_slow(case: Case, device: torch.device) -> str | None:
    """Why a compiled provider is left out, or None."""
    if device.type != "cpu" or os.environ.get(COMPILE_ON_CPU) == "1":
        return None
    return f"on the CPU only with {COMPILE_ON_CPU}=1: compiling takes a minute a case"


def needs_cuda(case: Case, device: torch.device) -> str | None:
    """Why a provider that runs on CUDA only is left out, or None."""
    return None if device.type == "cuda" else "it runs on CUDA only"


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds on the host's clock; on CUDA, once the device has finished all that was launched."""

    def after_the_device() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return after_the_device if device.type == "cuda" else time.perf_counter
