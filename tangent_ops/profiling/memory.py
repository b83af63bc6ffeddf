"""Measures memory: the peak of a call, and what autograd saves for its backward pass."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile

from tangent_ops.errors import ArgumentError


def peak_bytes(call: Callable[[], Any], device: torch.device | str) -> int:
    """Peak of the bytes that torch has allocated on ``device`` during ``call()``.

    Counted above what was allocated when the call began. Run the call once before: the first
    one also allocates what is kept for later ones (workspaces, gradients that are None).

    On CUDA this is the caching allocator's own count. On the CPU it is the peak of the running
    sum of the allocations and deallocations that the profiler records, in order of time; the
    call runs several times slower than without. Memory that the call did not allocate is not
    counted, so freeing it does not lower the result.

    Args:
        call: what to run, once; what it returns is dropped.
        device: of type "cpu" or "cuda".

    Raises:
        ArgumentError: another type of device.
    """
    device = torch.device(device)
    gc.collect()  # garbage of earlier calls, freed during this one, would lower the count
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ArgumentError(f"device={str(device)!r}: memory is measured on 'cpu' and 'cuda'")
    with profile(profile_memory=True) as record:
        call()
    return peak_of(_cpu_allocations(record))


def peak_of(allocations: Iterable[tuple[int, int]]) -> int:
    """Peak of the bytes held, of pairs (address, bytes; negative: freed) in order of time.

    Frees of what was not allocated in the sequence are ignored. The profiler remembers an address
    that it did not see freed in an earlier profile, and reports its size when the address recurs.
    """
    held: dict[int, int] = {}
    now = peak = 0
    for address, size in allocations:
        if size > 0:
            now += size - held.pop(address, 0)
            held[address] = size
            peak = max(peak, now)
        else:
            now -= held.pop(address, 0)
    return peak


def saved_bytes(call: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd saves during ``call()`` for a backward pass.

    Each storage counts once and in full, however many of the saved tensors are views of it.

    Args:
        call: a forward pass, with gradients enabled; what it returns is dropped.
        exclude: tensors whose storage is not counted, such as a model's parameters, which exist
            with or without a backward pass.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # kept alive, so that no address recurs
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(s.nbytes() for address, s in storages.items() if address not in own)


def _cpu_allocations(record: Any) -> Iterator[tuple[int, int]]:
    """(address, bytes) of every allocation on the CPU, in order of time."""
    found = []
    waiting = list(record.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            if fields.device.type == "cpu":
                found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    found.sort(key=lambda entry: entry[0])
    return ((address, size) for _, address, size in found)
