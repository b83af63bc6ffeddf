"""Checks the options of ``tangent-ops profile`` before anything is built or run."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import timm
import torch

from tangent_ops.errors import ArgumentError, TangentOpsError
from tangent_ops.model.linearize import last_blocks
from tangent_ops.profiling.sides import DTYPES, MODES, RIVALS, Settings, create


def check(
    *,
    model: str,
    batch: int,
    dtype: str,
    against: Sequence[str],
    mode: str,
    device: str | None,
    out: Path,
    steps: int,
    warmup: int,
    blocks: int | None,
) -> Settings:
    """The settings that the options describe.

    Raises:
        ArgumentError: naming the option, its value, what is supported and the way out.
    """
    _at_least("--batch", batch, 1, "give the number of images in a step")
    _at_least("--steps", steps, 1, "give the number of steps to time")
    _at_least("--warmup", warmup, 1, "the first step compiles and allocates, and is not timed")
    _one_of("--dtype", dtype, tuple(DTYPES))
    _one_of("--mode", mode, MODES)
    for rival in against:
        _one_of("--against", rival, RIVALS, "; leave it out for all of them")
    chosen = _device(device)
    _check_out(out)
    _check_model(model, blocks)
    rivals = tuple(dict.fromkeys(against)) or RIVALS
    return Settings(model, batch, dtype, mode, chosen, rivals, out, steps, warmup, blocks)


def _at_least(option: str, value: int, least: int, hint: str) -> None:
    if value < least:
        raise ArgumentError(f"{option} {value}: expected {least} or more; {hint}")


def _one_of(option: str, value: str, choices: Sequence[str], hint: str = "") -> None:
    if value not in choices:
        close = difflib.get_close_matches(value.lower(), choices, n=1)
        meant = f"; did you mean {close[0]}?" if close else hint
        raise ArgumentError(f"{option} {value}: expected {_or(choices)}{meant}")


def _or(choices: Sequence[str]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}"


def _device(name: str | None) -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ArgumentError(
            f"--device {name}: expected cpu, cuda or cuda:N; leave it out for CUDA if there is "
            "a device, or else the CPU"
        )
    if device.type == "cuda" and count == 0:
        raise ArgumentError(
            f"--device {name}: PyTorch {torch.__version__} finds no CUDA device here; use "
            "--device cpu, or check nvidia-smi and torch.version.cuda"
        )
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ArgumentError(f"--device {name}: expected cuda:0 to cuda:{count - 1}")
    return str(device)


def _check_out(out: Path) -> None:
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ArgumentError(
            f"--out {out}: {existing} is a file; give a folder, which is made if it does not exist"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ArgumentError(f"--out {out}: {existing} cannot be written to; give another folder")


def _check_model(name: str, blocks: int | None) -> None:
    if not timm.is_model(name):
        known = timm.list_models()
        close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}" if close else "timm.list_models() lists them"
        raise ArgumentError(f"--model {name}: timm {timm.__version__} has no such model; {hint}")
    try:
        with torch.device("meta"):  # shapes only: nothing is computed or allocated
            model = create(name)
    except Exception as error:  # whatever an architecture raises
        raise ArgumentError(
            f"--model {name}: timm cannot build it: {error}; give another one"
        ) from error
    if blocks is not None:
        try:
            last_blocks(model, blocks)
        except TangentOpsError as error:
            raise ArgumentError(
                f"--blocks {blocks}: {error}; leave it out to train all parameters"
            ) from error
