"""Seconds and bytes as people read them."""

from __future__ import annotations

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def digits(value: float) -> str:
    """Three significant ones, without exponents: 1234, 123, 12.3, 1.23, 0.123."""
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def duration(seconds: float) -> str:
    """ "1.23 ms"."""
    size, unit = _unit(seconds)
    return f"{digits(seconds / size)} {unit}"


def between(lower: float, upper: float, median: float) -> str:
    """ "1.21 to 1.31", in the unit of `duration(median)`."""
    size, _ = _unit(median)
    return f"{digits(lower / size)} to {digits(upper / size)}"


def _unit(seconds: float) -> tuple[float, str]:
    return next((unit for unit in _SECONDS if seconds >= unit[0]), _SECONDS[-1])


def amount(count: float) -> str:
    """ "12.3 MB", in powers of 1000."""
    size, unit = next((u for u in _BYTES if count >= u[0]), (1.0, "B"))
    return f"{digits(count / size) if size > 1 else f'{count:.0f}'} {unit}"
