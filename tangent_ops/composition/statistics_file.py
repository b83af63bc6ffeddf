"""Files of statistics: safetensors with a hash of their content, written completely or not at all.

A file reveals as much about its samples as the statistics: it is no privacy mechanism.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tangent_ops.composition.statistics import LIMIT, TangentStatistics
from tangent_ops.errors import ArgumentError, StatisticsError, StatisticsFileError, in_words
from tangent_ops.files import (
    check_target,
    content_sha256,
    opened,
    write_atomically,
    write_safetensors,
)

FORMAT = "tangent-ops statistics"
FORMAT_VERSION = "1"


def save_statistics(statistics: TangentStatistics, path: str | os.PathLike[str]) -> None:
    """Write statistics to a safetensors file, completely or not at all.

    The file is written under a temporary name in the same folder, synced to disk and renamed, so
    only a complete file replaces an existing one. The same content gives the same bytes. Of
    symmetric sums the file holds only the upper triangle.

    Args:
        statistics: with or without the list of its samples.
        path: the file; its folder must exist.

    Raises:
        ArgumentError: statistics is none; path is a folder or its folder does not exist.
        StatisticsError: its parts contradict each other.
        OSError: the folder cannot be written; a file at `path` is unchanged.
    """
    check_statistics(statistics, "statistics")
    path = Path(path).resolve()
    check_target(path)
    tensors, metadata = file_content(statistics)
    metadata["content_sha256"] = content_sha256(tensors, metadata)
    write_atomically(path, lambda file: write_safetensors(file, tensors, metadata))


def load_statistics(path: str | os.PathLike[str]) -> TangentStatistics:
    """Read a file written by `save_statistics`, checking its content hash.

    Args:
        path: the file.

    Returns:
        The statistics; the tensors own their memory.

    Raises:
        OSError: the file does not exist, or is a folder, a pipe or a device.
        StatisticsFileError: the file is truncated, was edited, or is not a file of statistics.
    """
    with opened(path) as name:
        try:
            with safe_open(name, framework="pt") as file:
                metadata = file.metadata() or {}
                check_format(path, metadata)
                # Cloned: the tensors would otherwise be mapped from the file and change with it.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise StatisticsFileError(
                f"{path} is truncated or no safetensors file: {in_words(error)}. Restore it "
                "from a copy"
            ) from error
    expected = metadata.pop("content_sha256", "missing")
    try:
        found = content_sha256(tensors, metadata)
    except KeyError as error:  # a dtype that no statistics have
        raise StatisticsFileError(f"{path} holds no statistics: {error}") from error
    if found != expected:
        raise StatisticsFileError(
            f"{path} was changed after it was written: content_sha256 is {found[:12]}, the header "
            f"says {expected[:12]}. Restore it from a copy"
        )
    return parsed(path, tensors, metadata)


def holds_statistics(path: str | os.PathLike[str]) -> bool:
    """Whether the header of a file says that it holds statistics; damaged files do not."""
    with opened(path) as name:
        try:
            with safe_open(name, framework="pt") as file:
                return (file.metadata() or {}).get("format") == FORMAT
        except SafetensorError:
            return False


def file_content(statistics: TangentStatistics) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, without the hash of the content."""
    tensors, metadata = statistics.to_tensors()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return tensors, {"format": FORMAT, "format_version": FORMAT_VERSION, **metadata}


def parsed(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> TangentStatistics:
    """The statistics of a file's tensors and metadata; `path` is for messages.

    Raises:
        StatisticsFileError: they are none, or their parts contradict each other.
    """
    check_format(path, metadata)
    try:
        statistics = TangentStatistics.from_tensors(tensors, metadata)
        check_statistics(statistics, str(path))
    except (StatisticsError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise StatisticsFileError(f"{path} holds no statistics: {error}") from error
    return statistics


def check_format(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Raise StatisticsFileError unless it is a header that this release reads."""
    if metadata.get("format") != FORMAT:
        raise StatisticsFileError(
            f"{path} is a safetensors file, but not a file of statistics of tangent-ops"
        )
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise StatisticsFileError(
            f"{path} has format version {version}, this release reads {FORMAT_VERSION}: update "
            "tangent-ops"
        )


def check_statistics(statistics: object, what: str) -> None:
    """Check that the parts of statistics fit each other, so that sums with them cannot overflow.

    Args:
        statistics: to be checked.
        what: it is, in the message.

    Raises:
        ArgumentError: it is not `TangentStatistics`.
        StatisticsError: the counts, the range or the list of samples contradict the rest.
    """
    if not isinstance(statistics, TangentStatistics):
        kind = type(statistics).__name__
        raise ArgumentError(f"{what} must be TangentStatistics, got a {kind}")
    counts, digests = statistics.counts, statistics.digests
    shapes = ((statistics.meta.outputs,), (1,))
    problem = None
    if counts.dtype != torch.int64 or tuple(counts.shape) not in shapes or int(counts.min()) < 0:
        problem = "the counts are not the numbers of samples of each class"
    elif digests is not None and (
        digests.dtype != torch.int64 or tuple(digests.shape) != (len(statistics), 2)
    ):
        problem = f"the list of samples has shape {tuple(digests.shape)} for {len(statistics)}"
    elif not 0 <= statistics.reach <= LIMIT or _largest(statistics) > statistics.reach:
        problem = f"the largest term is {_largest(statistics)}, beyond the reach of the samples'"
    if problem:
        raise StatisticsError(f"{what} contradicts itself: {problem}. Compute it again")


def _largest(statistics: TangentStatistics) -> int:
    """The largest magnitude of a term."""
    ends = [end for t in statistics.terms.values() if t.numel() for end in torch.aminmax(t)]
    return max((abs(int(end)) for end in ends), default=0)
