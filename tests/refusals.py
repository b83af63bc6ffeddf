"""Calls that must be refused, one on a line."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def refused(
    error: type[Exception], match: str, work: Callable[..., object], /, *args, **options
) -> None:
    with pytest.raises(error, match=match):
        work(*args, **options)
