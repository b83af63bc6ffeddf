"""Processes that do not outlive us, however we end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def started(command: Sequence[str], **options) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, which is killed on leaving. Its pipes carry text.

    Args:
        command: program and arguments.
        options: of `subprocess.Popen`.
    """
    with contextlib.ExitStack() as stack:
        with stops_held():  # or one that comes while it starts leaves nobody who knows its id
            # A session of its own: Ctrl-C reaches us alone, and its children die with it.
            process = subprocess.Popen(command, text=True, start_new_session=True, **options)
            stack.callback(_end, process)
        yield process


@contextlib.contextmanager
def stops_held() -> Iterator[None]:
    """Signals that come inside take effect at its end."""
    came: list[int] = []
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in STOPS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in came:
            signal.raise_signal(number)


def stop_by_exception() -> None:
    """Has Ctrl-C and SIGTERM raise SystemExit, once, so that what is open is closed."""
    for number in STOPS:
        signal.signal(number, _stop)


def _stop(number: int, frame: object) -> None:
    for other in STOPS:
        signal.signal(other, signal.SIG_IGN)  # a second Ctrl-C is not to end the cleaning up
    sys.exit(128 + number)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:  # or the id may be another one's by now
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(BrokenPipeError):  # of what was not sent any more
            if pipe is not None:
                pipe.close()
