"""Every error and warning that tangent-ops raises on purpose.

Each also derives from the built-in class a caller would expect, so that ``except ValueError``
keeps working without importing this module.
"""


class TangentOpsError(Exception):
    """Base class of all errors raised by tangent-ops."""


class ArgumentError(TangentOpsError, ValueError):
    """An argument has a value, shape, dtype or device that no backend supports."""


class UnsupportedError(TangentOpsError, NotImplementedError):
    """The request is meaningful, but the chosen backend or nesting does not compute it."""


class DeltaError(TangentOpsError, ValueError):
    """A delta does not fit: another anchor, other names, or other shapes."""


class DeltaFileError(DeltaError):
    """A delta file is truncated, was edited, or is no delta file at all."""


class LedgerError(TangentOpsError, ValueError):
    """A ledger refuses an operation, or its folder is damaged.

    Nothing was changed, unless the message says so.
    """


class LedgerBusyError(LedgerError):
    """Another process or thread kept the ledger locked; try again."""


class PlanError(TangentOpsError, ValueError):
    """A plan of shards is damaged, was made for something else, or refuses a change."""


class SampleError(TangentOpsError, ValueError):
    """A sample cannot be read, or is no longer the one that was planned with."""


class WorkerError(TangentOpsError, RuntimeError):
    """A process that trains a shard died, again and again."""


class CertificateError(TangentOpsError, ValueError):
    """A certificate does not hold, or is for something else."""


class ConvergenceError(TangentOpsError, ArithmeticError):
    """An iteration ended before its tolerance was reached."""


class NonFiniteLossError(TangentOpsError, ArithmeticError):
    """Training met a NaN or infinite loss."""


class ZeroHeadWarning(UserWarning):
    """The anchor's classifier is all zeros, so no block below it has a derivative."""


class NoGradientWarning(UserWarning):
    """A parameter that is to be trained gets no gradient in the ordinary model either."""


class NotConvergedWarning(UserWarning):
    """An exact fit ended before its bound fell below the tolerance."""
