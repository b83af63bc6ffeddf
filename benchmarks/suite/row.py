"""One line of a result: what a provider took for a case, or why there is no number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.suite.case import Case, Provider
from benchmarks.timing import Timing

Status = Literal["ok", "wrong", "failed", "absent"]


@dataclass(frozen=True)
class Row:
    """What is written to JSON, plotted and compared. Times in seconds, memory in bytes.

    Attributes:
        case: what was asked.
        provider: who answered.
        status: "ok"; "wrong": its error is above the bound, so it was not timed; "failed": it
            raised; "absent": it cannot answer this case here.
        note: why it is not "ok", or "".
        error: relative error against the exact answer, the worst of its results.
        timing: of calls as a user makes them; on CUDA between events on the device.
        graph: of replays of a CUDA graph of the call: the device alone. Small cases only.
        peak_bytes: allocated at most during the call, above what was there before.
        saved_bytes: what autograd keeps for the backward pass, parameters not counted.
        flops: the least operations that its question needs.
        bytes: the least memory traffic.
    """

    case: Case
    provider: str
    status: Status
    note: str = ""
    error: float | None = None
    timing: Timing | None = None
    graph: Timing | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    flops: float = 0.0
    bytes: float = 0.0

    @classmethod
    def of(cls, case: Case, provider: Provider, status: Status, note: str = "", **more) -> Row:
        """A row with the provider's own cost."""
        cost = provider.cost(case)
        return cls(case, provider.name, status, note, flops=cost.flops, bytes=cost.bytes, **more)

    @property
    def seconds(self) -> float | None:
        """The median that stands for it: the device's own where a graph shows it."""
        best = self.graph or self.timing
        return None if best is None else best.median

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Row:
        def timing(found: Mapping[str, Any] | None) -> Timing | None:
            return None if found is None else Timing(**found)

        case = Case(**{**entry["case"], "shape": tuple(entry["case"]["shape"])})
        times = {name: timing(entry[name]) for name in ("timing", "graph")}
        return cls(**{**entry, "case": case, **times})


@dataclass(frozen=True)
class Result:
    """All rows of one run, with its circumstances.

    Attributes:
        environment: machine, versions, commit, clocks, date: ``record.environment``.
        ceilings: of this machine in this run: "bytes/s", and "flops/s fp32" (bf16, fp16).
        rows: in the order they were measured.
    """

    environment: Mapping[str, str]
    ceilings: Mapping[str, float]
    rows: Sequence[Row]

    def to_json(self) -> dict[str, Any]:
        return {
            "environment": dict(self.environment),
            "ceilings": dict(self.ceilings),
            "rows": [row.to_json() for row in self.rows],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Result:
        """From a file of this suite: its own part stands under "tangent_ops"."""
        own = content.get("tangent_ops", content)
        return cls(own["environment"], own["ceilings"], [Row.from_json(r) for r in own["rows"]])
