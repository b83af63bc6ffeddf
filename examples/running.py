"""Runs an example from the command line."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable

from assets import DemoError
from rich.console import Console
from rich.markup import escape

from tangent_ops.errors import TangentOpsError

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reads it when it is loaded


def run(example: Callable[[argparse.Namespace], object], options: argparse.Namespace) -> int:
    """Run an example; print an error that the user can put right; return the exit status."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # torch's own
            example(options)
    except (DemoError, TangentOpsError) as error:
        message = f"[bold red]error:[/bold red] {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False)
        return 2
    return 0
