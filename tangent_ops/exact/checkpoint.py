"""`Checkpoint`: a solve's state in a file, written atomically, read only for the same problem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tangent_ops.errors import ArgumentError, in_words
from tangent_ops.files import content_sha256, write_atomically, write_safetensors

FORMAT = "tangent-ops solver checkpoint"


class Checkpoint:
    """One file.

    Args:
        path: of the file; its folder must exist.
        problem: name -> value of all that identifies the problem.
    """

    def __init__(self, path: Path, problem: Mapping[str, str]) -> None:
        self.path = path.resolve()
        self.problem = dict(problem)

    def write(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, str]) -> None:
        """Replace the file."""
        metadata = {"format": FORMAT, **_prefixed("problem.", self.problem)}
        metadata |= _prefixed("number.", numbers)
        metadata["content_sha256"] = content_sha256(tensors, metadata)
        write_atomically(self.path, lambda file: write_safetensors(file, tensors, metadata))

    def read(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """The tensors and numbers that were written last, or None if there is no file.

        Raises:
            ArgumentError: the file is damaged, something else, or of another problem.
        """
        if not self.path.exists():
            return None
        way_out = "delete it to start anew, or give another path"
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ArgumentError(
                f"checkpoint={self.path} is damaged ({in_words(error)}): {way_out}"
            ) from error
        expected = metadata.pop("content_sha256", None)
        if metadata.get("format") != FORMAT or content_sha256(tensors, metadata) != expected:
            raise ArgumentError(f"checkpoint={self.path} is damaged or no checkpoint: {way_out}")
        found = _without("problem.", metadata)
        other = sorted(key for key in self.problem if found.get(key) != self.problem[key])
        if other:
            raise ArgumentError(
                f"checkpoint={self.path} is of another problem ({', '.join(other)} differ): "
                f"{way_out}"
            )
        return tensors, _without("number.", metadata)

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self.path.unlink(missing_ok=True)


def _prefixed(prefix: str, entries: Mapping[str, str]) -> dict[str, str]:
    return {prefix + key: value for key, value in entries.items()}


def _without(prefix: str, entries: Mapping[str, str]) -> dict[str, str]:
    return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
