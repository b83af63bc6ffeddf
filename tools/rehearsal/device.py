"""A CUDA device for PyTorch that is none: ``torch.cuda`` answers, and tensors stay on the CPU."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import torch

from tools.rehearsal.names import Generator

NAME = "stand-in for a GPU"


class Event:
    """An event whose time is that of the host."""

    def __init__(self, enable_timing: bool = False, **options: Any):
        self.timing = enable_timing
        self.seconds: float | None = None

    def record(self, stream: object = None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds; positive, as divisors of a rate have to be."""
        if not (self.timing and end.timing) or self.seconds is None or end.seconds is None:
            raise RuntimeError("both events need enable_timing=True, and to be recorded")
        return max(1e3 * (end.seconds - self.seconds), 1e-6)

    def synchronize(self) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True


class Stream(contextlib.nullcontext):
    """A stream on which everything has already run."""

    cuda_stream = 0

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__()

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...


class CUDAGraph:
    """A graph that was captured: its replays do nothing."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Nothing(contextlib.nullcontext):
    """A context that takes any arguments."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__()


def fake_cuda(arch: int) -> None:
    """Make ``torch.cuda`` describe one GPU, and every tensor claim to be on it (``is_cuda``)."""
    properties = SimpleNamespace(
        name=NAME,
        major=arch // 10,
        minor=arch % 10,
        total_memory=80 << 30,
        L2_cache_size=50 << 20,
        multi_processor_count=132,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=227 << 10,
        warp_size=32,
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": (arch // 10, arch % 10),
        "get_device_properties": properties,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "mem_get_info": (70 << 30, 80 << 30),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *arguments, answer=answer, **options: answer)
    for name in ("init", "_lazy_init", "set_device", "synchronize", "empty_cache",
                 "reset_peak_memory_stats", "manual_seed", "manual_seed_all"):  # fmt: skip
        setattr(torch.cuda, name, lambda *arguments, **options: None)
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, lambda *arguments: Stream())
    for name in ("device", "graph", "stream"):
        setattr(torch.cuda, name, Nothing)
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.CUDAGraph = Event, Stream, CUDAGraph  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.cuda.get_rng_state_all = lambda: [torch.get_rng_state()]
    torch.cuda.set_rng_state_all = lambda states: torch.set_rng_state(states[0])
    torch.accelerator.is_available = lambda: False  # Dynamo would ask for its stream
    torch.accelerator.synchronize = lambda device=None: None
    cpu: Any = torch.cpu  # fork_rng asks the device's module
    cpu.get_rng_state = lambda device=None: torch.get_rng_state()
    cpu.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.Generator = Generator  # type: ignore[misc]
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
