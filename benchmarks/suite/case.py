"""What the suite asks, and who may answer: cases, providers, and workloads that hold both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]
Extent = Literal["default", "full"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GROUPS = (
    "attention-forward",
    "attention-backward",
    "attention-second-order",
    "elementwise",
    "linear",
    "model-forward",
    "train-step",
    "epoch",
)


@dataclass(frozen=True)
class Cost:
    """The least work that answers a question: floating-point operations and bytes of memory."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        group: one of GROUPS.
        op: what runs: "attention", "layer_norm", a timm model's name ...
        shape: its sizes, in the order that the workload documents.
        dtype: "fp32", "bf16" or "fp16".
        causal: of attention.
    """

    group: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    causal: bool = False

    def __str__(self) -> str:
        words = [self.op, "x".join(map(str, self.shape)), self.dtype]
        return " ".join([*words, "causal"] if self.causal else words)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def _always(case: Case, device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: "ours", "torch-jvp", "sdpa-flash" ...
        prepare: (case, inputs) -> the call that is checked, then timed. It gives the tensors of
            ``Workload.expected``, in that order; a yardstick, which computes less, the first ones.
        cost: what its own question needs at least.
        slack: how many times the workload's bound its error may be: 1 but for approximations.
        why_not: (case, device) -> why it cannot answer the case here, or None.
    """

    name: str
    prepare: Callable[[Case, Any], Call]
    cost: Callable[[Case], Cost]
    slack: float = 1.0
    why_not: Callable[[Case, torch.device], str | None] = _always


class Workload(Protocol):
    """Cases of one kind. Everything that the measuring needs to know of an op."""

    @property
    def groups(self) -> Sequence[str]: ...

    def cases(self, device: torch.device, extent: Extent) -> Sequence[Case]:
        """The cases that fit the device: a minute or so by default, or all."""
        ...

    def providers(self, case: Case) -> Sequence[Provider]:
        """Who may answer; the first is the one that the others are compared with."""
        ...

    def inputs(self, case: Case, device: torch.device, seed: int) -> Any:
        """Random operands."""
        ...

    def expected(self, case: Case, inputs: Any) -> Outputs:
        """The exact results, in float64, or as much of them as can be afforded."""
        ...

    def compared(self, case: Case, outputs: Outputs) -> Outputs:
        """The part of a provider's results that `expected` computes."""
        ...

    def bound(self, case: Case) -> float:
        """The relative error, norm over norm, above which an answer is wrong."""
        ...
