"""A step of the GPU check, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """A process; "{out}" in its command and environment is the folder that is archived."""

    name: str  # of its log, too
    command: Sequence[str]
    seconds: float  # its limit, in a part of nine minutes
    environment: Mapping[str, str] = field(default_factory=dict)  # beside this process'


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    step: str
    state: str  # "ok", "failed (exit status 1)", "cut", "not started"
    seconds: float = 0.0
