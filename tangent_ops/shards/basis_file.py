"""The file of a run's core basis: all cores' fixed sides, and hashes of what they remember."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tangent_ops.errors import PlanError, in_words
from tangent_ops.files import content_sha256, opened, to_json, write_atomically, write_safetensors
from tangent_ops.model.core_basis import CoreBasis

FORMAT = "tangent-ops core basis"
FORMAT_VERSION = "1"


def save_basis(basis: CoreBasis, path: Path) -> None:
    """Write a basis, completely or not at all."""
    tensors = {}
    for name, (left, right) in basis.items():
        tensors |= {f"left.{name}": left.cpu(), f"right.{name}": right.cpu()}
    hashes = bytearray(b"".join(sorted(basis.remembers)))
    if hashes:
        tensors["remembers"] = torch.frombuffer(hashes, dtype=torch.int64).view(-1, 4)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "names": to_json(list(basis)),
        "whole": to_json(basis.whole),
    }
    metadata["content_sha256"] = content_sha256(tensors, metadata)
    write_atomically(path, lambda file: write_safetensors(file, tensors, metadata))


def load_basis(path: Path) -> CoreBasis:
    """What `save_basis` wrote.

    Raises:
        PlanError: the file is missing, damaged, was edited, or is no basis.
    """
    try:
        with opened(path) as name, safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PlanError(
            f"{path} cannot be read: {in_words(error)}. Restore it from a copy"
        ) from error
    if (metadata.get("format"), metadata.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise PlanError(f"{path} is no core basis of format version {FORMAT_VERSION}")
    written = metadata.pop("content_sha256", "")
    if content_sha256(tensors, metadata) != written:
        raise PlanError(f"{path} was changed after it was written: restore it from a copy")
    sides = {
        name: (tensors[f"left.{name}"], tensors[f"right.{name}"])
        for name in json.loads(metadata["names"])
    }
    remembers = tensors.get("remembers", torch.zeros(0, 4, dtype=torch.int64))
    hashes = [row.numpy().tobytes() for row in remembers]
    return CoreBasis(sides, json.loads(metadata["whole"]), hashes)
