"""Anchor files: a timm model's weights, with a header from which the model is built again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tangent_ops.delta import fingerprint
from tangent_ops.errors import ArgumentError, PlanError, in_words
from tangent_ops.files import opened, to_json, write_atomically, write_safetensors

FORMAT = "tangent-ops anchor"
FORMAT_VERSION = "1"

_NAME = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class AnchorInfo:
    """What the header of an anchor's file says.

    Attributes:
        name: timm's name of the architecture.
        options: for ``timm.create_model``: num_classes and, perhaps, img_size and global_pool.
        classes: names of the classes, in the order of the logits; empty if unknown.
        input: how images are prepared, as timm resolves it: input_size, mean, std, interpolation,
            crop_pct, crop_mode.
        fingerprint: of the weights, as deltas record it.
        origin: what it was made from, in words; empty if unknown.
    """

    name: str
    options: dict[str, Any]
    classes: tuple[str, ...]
    input: dict[str, Any]
    fingerprint: str
    origin: str = ""


def save_anchor(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str,
    options: Mapping[str, Any],
    classes: Sequence[str] = (),
    origin: str = "",
) -> AnchorInfo:
    """Write a timm model to a file, completely or not at all.

    Args:
        model: ``timm.create_model(name, **options)``, with any weights of floating point or int64.
        path: the file, which is overwritten.
        name: timm's name of the architecture, without a tag.
        options: num_classes, and img_size or global_pool if they differ from the architecture's.
        classes: their names, in the order of the logits.
        origin: what it was made from, in words.

    Raises:
        ArgumentError: timm has no such architecture, or builds another model from these options.
        OSError: the file cannot be written.
    """
    from timm.data.config import resolve_model_data_config

    _check(str(name), options, ArgumentError)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    input = {
        key: value
        for key, value in resolve_model_data_config(model).items()
        if key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    }
    if options.get("img_size"):
        size = options["img_size"]
        input["input_size"] = (3, *(size if isinstance(size, (tuple, list)) else (size, size)))
    info = AnchorInfo(
        name, dict(options), tuple(classes), json.loads(to_json(input)), fingerprint(state), origin
    )
    _fits(build(info, ArgumentError), state, ArgumentError, "model")
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": name,
        "options": to_json(info.options),
        "classes": to_json(info.classes),
        "input": to_json(info.input),
        "fingerprint": info.fingerprint,
        "origin": info.origin,
    }
    write_atomically(Path(path), lambda file: write_safetensors(file, state, metadata))
    return info


def load_anchor(path: str | os.PathLike[str]) -> tuple[nn.Module, AnchorInfo]:
    """Build the model in a file written by `save_anchor`, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        PlanError: it is truncated, was edited, or is not an anchor's file.
    """
    info = read_anchor(path)
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if fingerprint(state) != info.fingerprint:
        raise PlanError(f"{path} was changed after it was written: restore it from a copy")
    model = build(info, PlanError)
    _fits(model, state, PlanError, str(path))
    model.load_state_dict(state, assign=True)
    return model.eval(), info


def read_anchor(path: str | os.PathLike[str]) -> AnchorInfo:
    """What the header says, without reading the weights.

    Raises:
        FileNotFoundError, PlanError: as in `load_anchor`.
    """
    with opened(path):
        pass  # raises the usual OSError for a missing or unreadable file; a pipe would block
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    except SafetensorError as error:
        raise PlanError(
            f"{path} is truncated or not a safetensors file: {in_words(error)}"
        ) from error
    if found.get("format") != FORMAT:
        raise PlanError(f"{path} is not an anchor's file: make one with shards.save_anchor")
    if found.get("format_version") != FORMAT_VERSION:
        raise PlanError(
            f"{path} has format version {found.get('format_version')}, this release reads "
            f"{FORMAT_VERSION}: update tangent-ops"
        )
    try:
        info = AnchorInfo(
            found["name"],
            dict(json.loads(found["options"])),
            tuple(map(str, json.loads(found["classes"]))),
            dict(json.loads(found["input"])),
            found["fingerprint"],
            found.get("origin", ""),
        )
        channels, height, width = info.input["input_size"]
        if not all(type(size) is int and 0 < size < 2**16 for size in (channels, height, width)):
            raise ValueError("input_size")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise PlanError(f"{path} has a damaged header: {error!r}. Restore it") from error
    _check(info.name, info.options, PlanError)
    return info


def _check(name: str, options: Mapping[str, Any], error: type[Exception]) -> None:
    if not _NAME.fullmatch(name):  # "hf-hub:" and "local-dir:" would download or load
        raise error(f"timm has no architecture {name!r}: its names are like vit_tiny_patch16_224")
    for key, value in options.items():
        if not _plain(key, value):
            raise error(
                f"option {key}={value!r}: expected only num_classes, img_size and global_pool"
            )
    if type(options.get("num_classes")) is not int:
        raise error("options lack num_classes: pass the number of the head's classes")


def _plain(key: str, value: Any) -> bool:
    """Whether a file may pass this option to timm; others could load or download files."""
    if key == "img_size":
        sizes = value if isinstance(value, (tuple, list)) else (value,)
        return bool(sizes) and all(type(size) is int and 0 < size < 2**16 for size in sizes)
    if key == "num_classes":
        return type(value) is int and 0 <= value < 2**20
    return key == "global_pool" and isinstance(value, str)


def build(info: AnchorInfo, error: type[Exception] = PlanError) -> nn.Module:
    """The model with initial weights; raises ``error`` if this timm has no such architecture."""
    import timm

    if not timm.is_model(info.name):
        raise error(f"timm {timm.__version__} has no architecture {info.name!r}")
    return timm.create_model(info.name, pretrained=False, **info.options)


def _fits(
    model: nn.Module, state: Mapping[str, torch.Tensor], error: type[Exception], what: str
) -> None:
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    differing = [key for key in own.keys() | given.keys() if own.get(key) != given.get(key)]
    if differing:
        raise error(
            f"{what} is not what timm builds from its name and options: {min(differing)} differs"
        )
