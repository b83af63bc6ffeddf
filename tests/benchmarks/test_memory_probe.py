"""Memory of a call, asked of another process."""

from __future__ import annotations

import torch

from benchmarks.suite.case import Case
from benchmarks.suite.memory import MemoryProbe


def test_a_probe_answers_and_outlives_its_worker() -> None:
    case = Case("elementwise", "gelu", (64, 100), "fp32")
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
