"""`open_ledger`: opens the ledger in a folder, of whichever kind it is."""

from __future__ import annotations

from pathlib import Path

from tangent_ops.composition.ledger.base import DATABASE
from tangent_ops.composition.ledger.ledger import Ledger
from tangent_ops.composition.ledger.records import Records
from tangent_ops.composition.ledger.statistics_ledger import StatisticsLedger


def open_ledger(path: Path) -> Ledger | StatisticsLedger:
    """The ledger in an existing folder.

    Raises:
        LedgerError: the folder holds no ledger, or a damaged one.
    """
    found = Records(path.absolute() / DATABASE, Ledger.__name__).found()
    kind = StatisticsLedger if found == "StatisticsLedger" else Ledger
    return kind(path, create=False)
