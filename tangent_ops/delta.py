"""Deltas: the trained parameters of a tangent model, in memory and on disk.

A delta file is a safetensors file whose tensors have the names of the anchor's parameters. Its
metadata holds the format's name and version, every field of `DeltaMeta`, and ``content_sha256``,
the SHA-256 of

1. one line of JSON (sorted keys, no spaces, ASCII, ended by a newline):
   ``{"metadata": {...}, "tensors": [[name, dtype, shape], ...]}`` with the tensors sorted by name
   and the metadata without ``content_sha256`` itself;
2. each tensor's bytes, C order, little-endian, in the same order.

The hash detects accidents and careless edits. It is not a signature: anybody who edits a file can
compute a new hash.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tangent_ops.errors import ArgumentError, DeltaError, DeltaFileError, few, in_words
from tangent_ops.files import (
    check_target,
    content_sha256,
    dtype_name,
    opened,
    write_atomically,
    write_safetensors,
)

FORMAT = "tangent-ops delta"
FORMAT_VERSIONS = ("1", "2", "3")  # 2: low rank, 3: cores, which older releases must not read

DeltaLike = Mapping[str, Tensor] | str | os.PathLike[str]  # a delta, or the path of its file

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CODES = ("BF16", "F16", "F32", "F64")  # the same in a file's header
_RANK = re.compile("[1-9][0-9]{0,8}")
_EXTRA = "extra."  # prefix of DeltaMeta.extra's keys in a file's metadata


@dataclass(frozen=True)
class DeltaMeta:
    """The origin of a delta. Change a field with `dataclasses.replace`.

    Attributes:
        anchor: `fingerprint` of the anchor's state dict, the model the delta belongs to.
        model: the anchor's name, for people.
        trainable: the pattern that chose the trained parameters.
        loss: the training loss, if any.
        shard: identifier of the part of the data the delta was trained on, if any.
        rank: rank of low-rank deltas, the factors B of Δw = B A; None if there are none.
        basis: `fingerprint` of their fixed factors A, or, without rank, of the sides B and A of
            cores C (Δw = B C A); None if all deltas are full.
        extra: anything else, as strings.

    Raises:
        ArgumentError: a field is not a string or has half a surrogate pair; rank is not a positive
            integer; or rank is given without a basis.
    """

    anchor: str
    model: str
    trainable: str
    loss: str | None = None
    shard: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    rank: int | None = None
    basis: str | None = None

    def __post_init__(self) -> None:
        fields = {"anchor": self.anchor, "model": self.model, "trainable": self.trainable}
        optional = {"loss": self.loss, "shard": self.shard, "basis": self.basis}
        fields |= {name: value for name, value in optional.items() if value is not None}
        fields |= {f"extra[{key!r}]": value for key, value in self.extra.items()}
        fields |= {f"extra's key {key!r}": key for key in self.extra}
        for name, value in fields.items():
            if not isinstance(value, str):
                raise ArgumentError(f"{name} must be a string, got {value!r}: use str(...)")
            if not _is_text(value):
                raise ArgumentError(f"{name} must be text, got half a surrogate pair: {value!r}")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ArgumentError(f"rank must be a positive integer or None, got {self.rank!r}")
        if self.rank is not None and self.basis is None:
            raise ArgumentError("rank needs a basis: give its fingerprint, or leave out rank")


class Delta(dict[str, Tensor]):
    """A dict of tensors named as the anchor's parameters, with their origin in `meta`.

    Args:
        tensors: name -> tensor of that parameter's shape.
        meta: the origin; None if unknown.
    """

    def __init__(self, tensors: Mapping[str, Tensor], meta: DeltaMeta | None = None) -> None:
        super().__init__(tensors)
        self.meta = meta

    def __repr__(self) -> str:
        values = sum(tensor.numel() for tensor in self.values())
        whose = "no meta" if self.meta is None else f"{self.meta.model}, {self.meta.trainable!r}"
        return f"Delta({len(self)} tensors, {values:,} values: {whose})"


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Hash names, shapes, dtypes and values of a state dict.

    The order of the entries, the device and the strides do not change the hash; any change of a
    value does.

    Args:
        state: name -> dense tensor of any dtype.

    Returns:
        SHA-256 in hexadecimal, 64 characters.
    """
    return content_sha256(state, metadata={})


def save_delta(
    delta: Mapping[str, Tensor], path: str | os.PathLike[str], *, meta: DeltaMeta | None = None
) -> None:
    """Write a delta to a safetensors file, completely or not at all.

    The file is written under a temporary name in the same folder, synced to disk and renamed, so
    only a complete file replaces an existing one. The same content gives the same bytes.

    Args:
        delta: name -> float64, float32, float16 or bfloat16 tensor, on any device.
        path: the file; its folder must exist.
        meta: replaces ``delta.meta``; required for a plain dict.

    Raises:
        ArgumentError: no meta; path is a folder or its folder does not exist.
        DeltaError: no tensors, an unsupported name or dtype, or a value that is not finite.
        OSError: the folder cannot be written; a file at `path` is unchanged.
    """
    meta = meta if meta is not None else getattr(delta, "meta", None)
    if meta is None:
        raise ArgumentError("a delta without meta needs save_delta(..., meta=DeltaMeta(...))")
    path = Path(path).resolve()
    check_target(path)
    tensors, metadata = file_content(delta, meta)
    write_atomically(path, lambda file: write_safetensors(file, tensors, metadata))


def file_content(
    delta: Mapping[str, Tensor], meta: DeltaMeta
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a delta's file.

    Raises:
        DeltaError: as in `save_delta`.
    """
    check_values(delta, "the delta")
    for name in delta:
        if name == "__metadata__" or not _is_text(name):
            why = "reserved by the file format" if _is_text(name) else "no text: half a surrogate"
            raise DeltaError(f"the name {name!r} is {why}")
    tensors = {name: value.detach().cpu().contiguous() for name, value in delta.items()}
    metadata = _metadata(meta)
    metadata["content_sha256"] = content_sha256(tensors, metadata)
    return tensors, metadata


def load_delta(
    path: str | os.PathLike[str],
    *,
    anchor: str | None = None,
    device: str | torch.device = "cpu",
) -> Delta:
    """Read a file written by `save_delta`, checking its content hash.

    Args:
        path: the file.
        anchor: the fingerprint (``tangent.fingerprint``) that the delta must have; None for any.
            ``tangent.load_delta_dict`` also checks rank, basis, names and shapes.
        device: device of the returned tensors.

    Returns:
        The delta with its `meta`; the tensors own their memory.

    Raises:
        ArgumentError: anchor is not a string.
        OSError: the file does not exist, or is a folder, a pipe or a device.
        DeltaFileError: the file is truncated, was edited, or is not a delta file.
        DeltaError: the delta belongs to another anchor.
    """
    if not (anchor is None or isinstance(anchor, str)):
        kind = type(anchor).__name__
        raise ArgumentError(
            f"anchor must be a fingerprint, got a {kind}: pass the tangent model's .fingerprint"
        )
    with opened(path) as name:  # a missing or unreadable file raises an OSError
        try:
            delta = _read(path, name)
        except (DeltaFileError, MemoryError):
            raise
        except SafetensorError as error:
            raise DeltaFileError(
                f"{path} is truncated, or no safetensors file ({in_words(error)}): restore a copy"
            ) from error
        except Exception as error:  # torch raises many kinds for invalid shapes
            raise DeltaFileError(f"{path} holds no delta: {error}") from error
    if anchor is not None:
        check_anchor(delta.meta, anchor, "as given", str(path))
    return Delta({name: value.to(device) for name, value in delta.items()}, delta.meta)


def open_delta(item: DeltaLike, index: int) -> tuple[Mapping[str, Tensor], str]:
    """A delta of a list, and its name for messages.

    Raises:
        ArgumentError: `item` is neither a dict nor a path.
        DeltaFileError: as in `load_delta`.
    """
    if isinstance(item, Mapping):
        return item, f"delta {index}"
    if isinstance(item, (str, os.PathLike)):
        return load_delta(item), os.fspath(item)
    kind = type(item).__name__
    raise ArgumentError(f"delta {index} must be a dict of tensors or a path, got a {kind}")


def check_several(deltas: object) -> None:
    """Raise ArgumentError if `deltas` is one delta instead of a list of them."""
    if isinstance(deltas, (Mapping, str, os.PathLike)):
        raise ArgumentError(f"deltas must be several, got one {type(deltas).__name__}: use a list")


def check_anchor(meta: DeltaMeta | None, expected: str, model: str, what: str) -> None:
    """Raise DeltaError if `meta` has another anchor than the fingerprint `expected`.

    Without meta the anchor is unknown and passes. The message names the expected anchor by `model`
    and the delta by `what`.
    """
    if meta is not None and meta.anchor != expected:
        raise DeltaError(
            f"{what} belongs to another anchor: {_short(meta.anchor)} ({meta.model}), "
            f"expected {_short(expected)} ({model})"
        )


def check_kind(meta: DeltaMeta | None, rank: int | None, basis: str | None, what: str) -> None:
    """Raise DeltaError if `meta` has another rank or basis.

    Without meta they are unknown and pass. The message names the delta by `what`.
    """
    if meta is None or (meta.rank, meta.basis) == (rank, basis):
        return
    found, expected = _kind(meta.rank, meta.basis), _kind(rank, basis)
    if found != expected:
        way_out = "full_delta_dict() of its own model gives full deltas"
        if expected != "full":
            option = "core=..." if found == "a core" else f"rank={meta.rank}"
            way_out = f"load it into linearize(..., {option})"
        raise DeltaError(f"{what} is {found}, expected {expected}: {way_out}")
    raise DeltaError(
        f"{what} has another basis: {_short(meta.basis or '')}, expected {_short(basis or '')}. "
        "Linearize with the basis (the seed, or the tensors) that it was trained with"
    )


def check_layout(delta: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raise DeltaError, with the differences, unless names and shapes equal those of `expected`."""
    names = {
        "missing": expected.keys() - delta.keys(),
        "unexpected": delta.keys() - expected.keys(),
    }
    differences = [f"{label} {few(sorted(names[label]))}" for label in names if names[label]]
    differences += [
        f"{name} has shape {tuple(delta[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & delta.keys())
        if delta[name].shape != expected[name].shape
    ][:3]
    if differences:
        raise DeltaError(f"{what} does not fit: {'; '.join(differences)}")


def check_values(delta: Mapping[str, Tensor], what: str) -> None:
    """Raise DeltaError unless `delta` maps names to finite floating-point tensors, at least one."""
    if not delta:
        raise DeltaError(f"{what} has no tensors")
    for name, value in delta.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise DeltaError(f"{what} maps {name!r} to a {type(value).__name__}, not to a tensor")
        if problem := unreadable(value):
            raise DeltaError(f"{what}: {name} {problem}")
        if value.dtype not in _DTYPES:
            supported = ", ".join(map(dtype_name, _DTYPES))
            raise DeltaError(f"{what}: {name} is {value.dtype}; supported are {supported}")
    broken = [name for name, value in delta.items() if not value.isfinite().all()]
    if broken:
        raise DeltaError(f"{what} has values that are not finite in {few(sorted(broken))}")


def unreadable(value: Tensor) -> str | None:
    """Why a tensor cannot be saved, and the way out; None if it can."""
    if value.is_meta:
        return "is on the meta device, without values: load or initialize it first"
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        return f"is {kind}, only dense tensors are supported: use to_dense(), or pad it"
    return None


def parse_meta(metadata: Mapping[str, str]) -> DeltaMeta:
    """The DeltaMeta in the header of a delta file."""
    names = ("anchor", "model", "trainable", "loss", "shard", "basis")
    extra = {
        key.removeprefix(_EXTRA): value for key, value in metadata.items() if key.startswith(_EXTRA)
    }
    rank = int(metadata["rank"]) if "rank" in metadata else None
    known = {name: metadata[name] for name in names if name in metadata}
    return DeltaMeta(**known, extra=extra, rank=rank)


def _metadata(meta: DeltaMeta) -> dict[str, str]:
    fields = asdict(meta)
    extra = fields.pop("extra")
    return {
        "format": FORMAT,
        "format_version": _version(meta),
        **{name: str(value) for name, value in fields.items() if value is not None},
        **{_EXTRA + key: value for key, value in extra.items()},
    }


def _read(path: str | os.PathLike[str], name: str) -> Delta:
    """Read the open file `name`, called `path` in messages; may raise anything."""
    with safe_open(name, framework="pt") as file:
        metadata = file.metadata() or {}
        _check_format(path, metadata)
        for key in file.keys():  # noqa: SIM118
            if (code := file.get_slice(key).get_dtype()) not in _CODES:
                raise DeltaFileError(
                    f"{path} is not a delta file: {key} is {code}, not in {_CODES}"
                )
        # Cloned: the tensors would otherwise be mapped from the file and change with it.
        delta = Delta({key: file.get_tensor(key).clone() for key in file.keys()})  # noqa: SIM118
    expected = metadata.pop("content_sha256")
    found = content_sha256(delta, metadata)
    if found != expected:
        raise DeltaFileError(
            f"{path} was changed after it was written: content_sha256 is {_short(found)}, "
            f"the header says {_short(expected)}. Restore it from a copy"
        )
    try:
        check_values(delta, str(path))
    except DeltaError as error:
        raise DeltaFileError(f"{error}: save_delta writes no such file") from error
    delta.meta = parse_meta(metadata)
    return delta


def _check_format(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise DeltaFileError(f"{path} is a safetensors file, but not a delta file of tangent-ops")
    version = metadata.get("format_version")
    if version not in FORMAT_VERSIONS:
        raise DeltaFileError(
            f"{path} has format version {version}, this release reads 1, 2, 3: update tangent-ops"
        )
    needed = {"anchor", "model", "trainable", "content_sha256"}
    own = {"1": set(), "2": {"rank", "basis"}, "3": {"basis"}}[version]
    if missing := (needed | own) - metadata.keys():
        raise DeltaFileError(f"{path} lacks {few(sorted(missing))} in its header")
    if extra := ({"rank", "basis"} - own) & metadata.keys():
        raise DeltaFileError(
            f"{path} has {few(sorted(extra))} in its header, which format {version} does not have"
        )
    if not _RANK.fullmatch(metadata.get("rank", "1")):
        raise DeltaFileError(
            f"{path} has rank {metadata['rank'][:20]!r} in its header, not a number from 1 up"
        )


def _is_text(value: str) -> bool:
    """Whether UTF-8 can encode it; half a surrogate pair would make the file unreadable."""
    return not re.search("[\ud800-\udfff]", value)


def _version(meta: DeltaMeta) -> str:
    return "1" if meta.basis is None else "3" if meta.rank is None else "2"


def _kind(rank: int | None, basis: str | None) -> str:
    return "full" if basis is None else "a core" if rank is None else f"of rank {rank}"


def _short(digest: str) -> str:
    return digest[:12]
