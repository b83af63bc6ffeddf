"""Check and measure on a GPU, in parts of at most nine minutes; each writes one archive.

    PYTHONPATH=.:kernels python3 -m tools.gpu_check smoke --out DIR    # from the repository's root
    PYTHONPATH=.:kernels python3 -m tools.gpu_check smoke tune models tests --out DIR

Every part has steps, each a process with a time limit; a slow step is cut and the next one runs.
DIR/PART.tar.gz has logs, results and a table. It is written anew while steps run, so a run that is
killed leaves what it had. The exit status is 1 if a step failed or was cut, 2 without one GPU.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.gpu_check.parts import PARTS
from tools.gpu_check.runner import run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.gpu_check", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, help="in this order")
    parser.add_argument("--out", type=Path, required=True, help="folder for the archives")
    words = "limit of a part, and of its steps in proportion (default: 9)"
    parser.add_argument("--minutes", type=float, default=9.0, help=words)
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes={options.minutes:g}: expected more than 0")
    if problem := _without_one_gpu():
        print(problem, file=sys.stderr)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}; name a folder")
    statuses = [run(part, PARTS[part], options.out, 60 * options.minutes) for part in options.parts]
    return max(statuses)


def _without_one_gpu() -> str | None:
    """Why this machine cannot be checked, and what to do."""
    if not torch.cuda.is_available():
        return (
            "gpu-check needs a CUDA device, and torch finds none here. Without one, `make test` "
            "runs the kernels interpreted, and `make compile-check` compiles them."
        )
    if (count := torch.cuda.device_count()) > 1:
        return (
            f"gpu-check measures one CUDA device, and torch finds {count}: "
            "name one, as by CUDA_VISIBLE_DEVICES=0."
        )
    return None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a running step ends with it
    sys.exit(main())
