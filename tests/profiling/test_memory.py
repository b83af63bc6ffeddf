"""Memory of a call, against calls whose allocations are known by counting."""

from __future__ import annotations

import pytest
import torch

from tangent_ops.errors import ArgumentError
from tangent_ops.profiling.memory import peak_bytes, peak_of, saved_bytes

KIB = 1024  # sizes are far above what an allocator rounds to


def block(kib: int, device: str = "cpu") -> torch.Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8, device=device)


def rises_and_falls(device: str = "cpu") -> torch.Tensor:
    """Holds at most 32 + 16 KiB: 8 are allocated after 32 have been freed."""
    first = block(32, device)
    second = block(16, device)
    del first
    third = block(8, device)
    return torch.cat((second, third))  # 16 + 8 + 24 = 48: as high once more


def test_the_peak_is_what_is_held_at_once() -> None:
    assert peak_bytes(rises_and_falls, "cpu") == 48 * KIB


def test_what_is_freed_before_the_end_counts() -> None:
    def call() -> None:
        for _ in range(3):
            block(64)

    assert peak_bytes(call, "cpu") == 64 * KIB


def test_a_call_that_allocates_nothing_has_no_peak() -> None:
    x = block(64)
    assert peak_bytes(lambda: x.view(2, -1), "cpu") == 0


def test_memory_from_before_the_call_is_not_counted() -> None:
    held = [block(64)]

    def call() -> torch.Tensor:
        held.clear()
        return block(16)

    assert peak_bytes(call, "cpu") == 16 * KIB


def test_memory_kept_from_an_earlier_call_is_not_counted() -> None:
    """What one profile saw allocated is freed after it, and its address allocated again."""
    kept = []
    for _ in range(5):
        assert peak_bytes(lambda: kept.append(block(64)), "cpu") == 64 * KIB
        kept.clear()


def test_the_backward_pass_is_seen() -> None:
    """y = x W; the gradients of x and W are made while the cotangent of y is still held."""
    x = torch.randn(64, 128, requires_grad=True)
    w = torch.randn(128, 256, requires_grad=True)

    def call() -> None:
        (x @ w).backward(torch.ones(64, 256))
        x.grad = w.grad = None

    y, grads = 64 * 256 * 4, (64 * 128 + 128 * 256) * 4
    assert grads + y <= peak_bytes(call, "cpu") <= grads + 2 * y


@pytest.mark.gpu
def test_the_peak_on_cuda() -> None:
    before = block(512, "cuda")
    assert peak_bytes(lambda: rises_and_falls("cuda"), "cuda") == 48 * KIB
    del before


def test_another_device_is_refused_before_the_call() -> None:
    calls = []
    with pytest.raises(ArgumentError, match=r"'meta'.*'cpu' and 'cuda'"):
        peak_bytes(lambda: calls.append(1), "meta")
    assert not calls


@pytest.mark.parametrize(
    ("allocations", "peak"),
    [
        ([], 0),
        ([(1, 10), (2, 5), (1, -10), (3, 7)], 15),
        ([(1, 10), (1, -10), (1, 20), (1, -20)], 20),
        ([(9, -100), (1, 10)], 10),  # freed, but not allocated here
        ([(1, 10), (1, -4), (2, 10)], 10),  # what counts is what was allocated
        ([(1, 10), (1, 20)], 20),  # its end was missed: the address came again
    ],
)
def test_peak_of_a_sequence(allocations: list[tuple[int, int]], peak: int) -> None:
    assert peak_of(allocations) == peak


def test_saved_tensors_are_counted_once() -> None:
    """sin saves x; x * y saves both; a view of x saves x's storage, whole."""
    x = torch.randn(100, requires_grad=True)
    y = torch.randn(100, requires_grad=True)
    assert saved_bytes(x.sin) == 400
    assert saved_bytes(lambda: x * y) == 800
    assert saved_bytes(lambda: (x * y, x.sin(), x[:10].cos())) == 800


def test_excluded_tensors_are_not_counted() -> None:
    x = torch.randn(100, requires_grad=True)
    y = torch.randn(50, requires_grad=True)
    assert saved_bytes(lambda: (x.sin(), y.sin()), exclude=[x]) == 200
    assert saved_bytes(lambda: (x.sin(), y.sin()), exclude=(t for t in (x, y))) == 0


def test_nothing_is_saved_without_gradients() -> None:
    x = torch.randn(100, requires_grad=True)
    with torch.no_grad():
        assert saved_bytes(x.sin) == 0
