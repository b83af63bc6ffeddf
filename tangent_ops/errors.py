"""The errors and warnings that tangent-ops raises.

Each also derives from the built-in class that fits it, so that ``except ValueError`` catches it
without an import of this module.
"""

import errno
import os
from collections.abc import Iterable


class TangentOpsError(Exception):
    """Base class of all errors raised by tangent-ops."""


class ArgumentError(TangentOpsError, ValueError):
    """An argument has a value, shape, dtype or device that no backend supports."""


class UnsupportedError(TangentOpsError, NotImplementedError):
    """The call is valid, but the chosen backend or nesting does not compute it."""


class DeltaError(TangentOpsError, ValueError):
    """A delta has another anchor, other names or other shapes than expected."""


class DeltaFileError(DeltaError):
    """A delta file is truncated, was edited, or is not a delta file."""


class LedgerError(TangentOpsError, ValueError):
    """A ledger does not allow an operation, or its folder is damaged.

    The ledger is unchanged unless the message says otherwise.
    """


class LedgerBusyError(LedgerError):
    """Another process or thread kept the ledger locked; try again."""


class StatisticsError(TangentOpsError, ValueError):
    """Statistics do not fit each other, are out of range, or do not determine an optimum."""


class StatisticsFileError(StatisticsError):
    """A file of statistics is truncated, was edited, or is not a file of statistics."""


class PlanError(TangentOpsError, ValueError):
    """A plan of shards is damaged, does not fit, or does not allow a change."""


class SampleError(TangentOpsError, ValueError):
    """A sample cannot be read, or differs from the one in the plan."""


class WorkerError(TangentOpsError, RuntimeError):
    """A process that trains a shard died repeatedly."""


class DiskFullError(TangentOpsError, OSError):
    """The disk is full; a file was not written."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOSPC


class CertificateError(TangentOpsError, ValueError):
    """A certificate does not hold, or belongs to another fit."""


class ConvergenceError(TangentOpsError, ArithmeticError):
    """An iteration ended before it reached its tolerance."""


class NonFiniteLossError(TangentOpsError, ArithmeticError):
    """Training met a NaN or infinite loss."""


class ZeroHeadWarning(UserWarning):
    """The anchor's classifier is all zeros, so no block below it has a derivative."""


class NoGradientWarning(UserWarning):
    """A trained parameter gets no gradient in the ordinary model either."""


class NotConvergedWarning(UserWarning):
    """An exact fit ended before its bound fell below the tolerance."""


def few(names: Iterable[str]) -> str:
    """The first three names and the number of the others, for a message."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


_REASONS = {
    errno.ENOENT: "there is no such file or folder: check the path",
    errno.EACCES: "no permission: change the permissions, or give another path",
    errno.EPERM: "no permission: change the permissions, or give another path",
    errno.EISDIR: "it is a folder: give a file",
    errno.ENOTDIR: "a part of the path is a file, not a folder: check the path",
    errno.EEXIST: "it exists: give another path",
    errno.EROFS: "it is on a disk that cannot be written: give another path",
    errno.ENAMETOOLONG: "the name is too long: give a shorter one",
    errno.ELOOP: "it is a symbolic link, or links lead in a circle: give the file itself",
    errno.ENOSPC: "the disk is full: make room, and try again",
    errno.EDQUOT: "your quota of the disk is used up: make room, and try again",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.EIO: "the disk cannot be read or written: check it",
}


def in_words(error: BaseException) -> str:
    """An error in words; for one of the system which file, what is wrong and the way out."""
    if not isinstance(error, OSError) or error.errno is None or error.strerror is None:
        return str(error).removeprefix("Error while deserializing header: ")  # of safetensors
    reason = _REASONS.get(error.errno, error.strerror)
    if error.filename is None:
        return reason
    return f"{os.fsdecode(error.filename)}: {reason}"
