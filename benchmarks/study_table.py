"""How many of the study's claims hold, from `docs/study/claims.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT
from benchmarks.stored import BadFile

CLAIMS = ROOT / "docs" / "study" / "claims.json"


def read_study(path: Path = CLAIMS) -> dict[str, Any] | None:
    """What `python -m studies.paper` wrote; None if nothing is there.

    Raises:
        BadFile: it is something else.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in ("claims", "verdicts", "ran")}
    except (KeyError, TypeError, ValueError) as problem:
        raise BadFile(f"{path} is not the study's claims.json: {problem}") from None


def study_table(study: Mapping[str, Any] | None) -> str:
    """The number of claims of every verdict, and beneath what was run."""
    if study is None:
        return "Not measured yet."
    verdicts = [claim["verdict"] for claim in study["claims"]]
    count = [f"{verdicts.count(name)} {words}" for name, words in study["verdicts"].items()]
    told = f"{', '.join(count[:-1])} and {count[-1]}"
    return f"Of {len(verdicts)} claims {told}.\n\n{study['ran']}; `make study`."
