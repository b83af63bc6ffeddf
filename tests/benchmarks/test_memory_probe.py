"""Memory of a call, asked of another process."""

from __future__ import annotations

import torch

from benchmarks.suite.case import Case
from benchmarks.suite.memory import MemoryProbe, measure

GELU = Case("elementwise", "gelu", (64, 100), "fp32")


def test_a_probe_answers_and_outlives_its_worker() -> None:
    case = GELU
    step = Case("elementwise", "gelu-step", (64, 100), "fp32")
    tensor = 64 * 100 * 4
    with MemoryProbe(torch.device("cpu")) as probe:
        peak, saved = probe.ask(case, "plain") or (0, 0)
        assert tensor <= peak < 2 * tensor and saved == 0  # the output; no backward pass
        assert probe.ask(case, "nobody") is None
        assert probe.ask(step, "plain") is not None  # a question that failed ends nothing
        probe._worker.kill()
        assert probe.ask(case, "plain") is None
        assert probe.ask(case, "plain") == (peak, saved)


def test_what_tracing_leaves_behind_does_no_harm() -> None:
    """The compiler does: wrappers of transforms that are over, which have no storage."""
    left: list[torch.Tensor] = []
    torch.func.vmap(lambda x: left.append(x) or x)(torch.ones(2, 3))
    assert measure(GELU, "plain", torch.device("cpu"))[1] == 0
    assert left
