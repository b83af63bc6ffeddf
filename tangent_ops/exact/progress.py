"""`progress_bar`: the progress bars of the exact methods; each says what is computed."""

from __future__ import annotations

from tqdm.auto import tqdm

DELAY = 2.0  # seconds before a bar inside another, or of one pass, is shown


def progress_bar(
    what: str, unit: str, total: int | None, progress: bool, *, inner: bool = True
) -> tqdm:
    """A progress bar.

    Args:
        what: is computed.
        unit: of what is counted.
        total: of the units; None if it is not known.
        progress: whether to show the bar.
        inner: shown only if it takes longer than `DELAY`, and removed at its end.
    """
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        delay=DELAY if inner else 0,
        leave=not inner,
        disable=not progress,
    )
