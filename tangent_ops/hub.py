"""Pushes deltas, statistics and ledgers to a Hugging Face repository, and pulls them.

A repository, or a folder, holds one of them, with `tangent_ops.json`, which lists its files and
their hashes. Only safetensors, JSON and a ledger's database are read; nothing is executed.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from tangent_ops.composition.ledger import Ledger, StatisticsLedger, open_ledger
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.composition.statistics_file import (
    holds_statistics,
    load_statistics,
    save_statistics,
)
from tangent_ops.delta import Delta, DeltaMeta, check_anchor, load_delta, save_delta
from tangent_ops.errors import ArgumentError, DeltaFileError, LedgerError

INDEX = "tangent_ops.json"
CARD = "README.md"
VERSION = 1
_KINDS = ("delta", "statistics", "ledger")
_FILES = re.compile(
    r"delta\.safetensors|statistics\.safetensors|ledger/ledger\.sqlite"
    r"|ledger/(deltas|statistics|sums)/[0-9a-f]{32}\.safetensors"
)
_FORGOTTEN = ("forgotten", "samples forgotten")

AnyPath: TypeAlias = str | PathLike[str]
Shareable: TypeAlias = Delta | TangentStatistics | Ledger | StatisticsLedger


@dataclass(frozen=True)
class Index:
    """What `tangent_ops.json` says.

    Attributes:
        kind: "delta", "statistics" or "ledger".
        files: path in the folder -> SHA-256 of the file.
        facts: for the model card: anchor, model, trainable, loss, samples or shards.
        forgotten: how often a ledger has forgotten something.
        version: of this format.
    """

    kind: str
    files: dict[str, str]
    facts: dict[str, str] = field(default_factory=dict)
    forgotten: int = 0
    version: int = VERSION


def save_pretrained(item: Shareable | Mapping[str, Tensor] | AnyPath, folder: AnyPath) -> Path:
    """Write a delta, statistics or a ledger into a new or empty folder, as `push_to_hub` would.

    Args:
        item: a `Delta`, `TangentStatistics`, `Ledger` or `StatisticsLedger`; or the path of a file
            or a ledger of one of them.
        folder: new or empty.

    Returns:
        The folder. It has `tangent_ops.json` and a model card, `README.md`.

    Raises:
        ArgumentError: item is something else, or the folder is not empty.
        DeltaError, StatisticsError, LedgerError, OSError: as what writes item raises.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(f"{folder} is not an empty folder: give a new one")
    item = _opened(item)
    folder.mkdir(parents=True, exist_ok=True)
    index = _written(item, folder)
    (folder / CARD).write_text(_card(index), encoding="utf-8")
    # Last, so a folder with an index is complete.
    (folder / INDEX).write_text(json.dumps(asdict(index), indent=2, sort_keys=True) + "\n", "utf-8")
    return folder


def load_pretrained(folder: AnyPath, *, anchor: str | None = None) -> Shareable:
    """Read what `save_pretrained` wrote.

    Args:
        folder: a ledger in it is opened where it is, so later changes are made there.
        anchor: the fingerprint (``tangent.fingerprint``) that it must have; None for any.

    Returns:
        A `Delta`, `TangentStatistics`, `Ledger` or `StatisticsLedger`.

    Raises:
        DeltaFileError: the folder has no index, or a file is missing, was changed, or is not named.
        DeltaError: it belongs to another anchor.
        StatisticsFileError, LedgerError: as `load_statistics` and `Ledger.verify`.
    """
    folder = Path(folder).absolute()
    index = _read_index(folder)
    for name, sha256 in index.files.items():
        found = _sha256(folder / name)
        if found != sha256:
            raise DeltaFileError(
                f"{folder / name} was changed after it was written: its SHA-256 is {found[:12]}, "
                f"{INDEX} says {sha256[:12]}. Restore it from a copy, or pull it again"
            )
    if index.kind == "delta":
        return load_delta(folder / "delta.safetensors", anchor=anchor)
    if index.kind == "statistics":
        statistics = load_statistics(folder / "statistics.safetensors")
        _check(statistics.meta.delta, anchor, folder)
        return statistics
    ledger = open_ledger(folder / "ledger")
    ledger.verify(progress=False)
    for meta in _metas(ledger) if anchor is not None else ():
        _check(meta, anchor, folder)
    return ledger


def push_to_hub(
    item: Shareable | Mapping[str, Tensor] | AnyPath,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = True,
    token: str | bool | None = None,
    commit_message: str | None = None,
    keep_forgotten: bool = False,
) -> str:
    """Push a delta, statistics or a ledger to a Hugging Face repository, in one commit.

    The repository is made if there is none. Files of an earlier push that are not in this one are
    removed in the same commit; all other files stay. A model card is written if there is none; the
    licence is yours to add.

    **The repository keeps its history.** What was pushed once stays in its older commits, and in
    copies that others have pulled, whatever is forgotten later. So a ledger that has forgotten
    something since the last push is refused: delete the repository, or squash its history
    (``HfApi().super_squash_history(repo_id)``, after the push), or push to a new one. Statistics
    and deltas reveal data, too.

    Args:
        item: as in `save_pretrained`.
        repo_id: such as "user/name".
        revision: a branch; None for the main one.
        private: of a new repository. True unless you say otherwise, as these files reveal data.
        token: None for the one of ``hf auth login``.
        commit_message: None for one that names the kind.
        keep_forgotten: push although the history keeps what the ledger has forgotten.

    Returns:
        The commit's URL.

    Raises:
        ImportError: huggingface_hub is not installed (extra ``huggingface``).
        LedgerError: the ledger has forgotten something that the repository's history keeps.
        ArgumentError, DeltaError, StatisticsError, OSError: as in `save_pretrained`.
        huggingface_hub.errors.HfHubHTTPError: what the server says.
    """
    hub = _huggingface_hub()
    item = _opened(item)
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(item, Path(temporary) / "item")
        index = _read_index(folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        present = set(api.list_repo_files(repo_id, revision=revision))
        before = None
        if INDEX in present:
            path = hub.hf_hub_download(
                repo_id, INDEX, revision=revision, token=token, local_dir=Path(temporary) / "before"
            )
            before = _parsed(Path(path), check_names=False)
        _refuse_history(index, before, repo_id, keep_forgotten)
        names = [*index.files, INDEX, *([] if CARD in present else [CARD])]
        gone = (set(before.files) & present) - set(index.files) if before else set()
        operations = [
            *(hub.CommitOperationAdd(name, str(folder / name)) for name in names),
            *(hub.CommitOperationDelete(name) for name in sorted(gone) if _FILES.fullmatch(name)),
        ]
        done = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Push a {index.kind} of tangent-ops",
            revision=revision,
        )
    return done.commit_url


def pull_from_hub(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    anchor: str | None = None,
    folder: AnyPath | None = None,
) -> Shareable:
    """Pull what `push_to_hub` pushed, and check it as `load_pretrained` does.

    Args:
        repo_id: such as "user/name".
        revision: a branch, tag or commit; None for the main branch.
        token: None for the one of ``hf auth login``.
        anchor: the fingerprint that it must have; None for any.
        folder: where the files are put, new or empty; needed for a ledger, which lives there. None
            keeps no file.

    Raises:
        ImportError: huggingface_hub is not installed (extra ``huggingface``).
        ArgumentError: no folder for a ledger, or one that is not empty.
        DeltaFileError, DeltaError, StatisticsFileError, LedgerError: as in `load_pretrained`.
        huggingface_hub.errors.HfHubHTTPError: what the server says.
    """
    hub = _huggingface_hub()
    if folder is not None:
        folder = Path(folder).absolute()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ArgumentError(f"{folder} is not an empty folder: give a new one")
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary)
        commit = hub.HfApi(token=token).repo_info(repo_id, revision=revision).sha

        def get(name: str) -> Path:
            """Of one commit, even if another is pushed meanwhile."""
            path = hub.hf_hub_download(repo_id, name, revision=commit, token=token, local_dir=where)
            return Path(path)

        try:
            index = _parsed(get(INDEX))
        except hub.errors.EntryNotFoundError as error:
            raise DeltaFileError(
                f"{repo_id} has no {INDEX}: nothing was pushed there with push_to_hub"
            ) from error
        if index.kind == "ledger" and folder is None:
            raise ArgumentError(f"{repo_id} holds a ledger: give the folder where it shall live")
        for name in index.files:
            get(name)
        loaded = load_pretrained(where, anchor=anchor)
        if folder is None:
            return loaded
        save_pretrained(loaded, folder)
    return load_pretrained(folder, anchor=anchor)


def _opened(item: object) -> Any:
    """The item itself, or what is at its path."""
    if isinstance(item, (Delta, TangentStatistics, Ledger, StatisticsLedger)):
        return item
    if isinstance(item, (str, PathLike)):
        path = Path(item)
        if path.is_dir():
            return open_ledger(path)
        return load_statistics(path) if holds_statistics(path) else load_delta(path)
    raise ArgumentError(
        f"item must be a Delta, TangentStatistics, Ledger or StatisticsLedger, or a path of one, "
        f"got a {type(item).__name__}: of a tangent model push tangent.delta_dict()"
    )


def _written(item: Any, folder: Path) -> Index:
    """Write the item's files; return the index."""
    forgotten = 0
    if isinstance(item, Delta):
        save_delta(item, folder / "delta.safetensors")
        assert item.meta is not None
        kind, facts = "delta", _facts(item.meta)
    elif isinstance(item, TangentStatistics):
        save_statistics(item, folder / "statistics.safetensors")
        kind = "statistics"
        facts = {**_facts(item.meta.delta), "samples": f"{len(item):,}"}
    else:
        (folder / "ledger").mkdir()
        item.copy_to(folder / "ledger")
        kind, metas = "ledger", _metas(item)
        facts = {"ledger": type(item).__name__, "shards": f"{len(item):,}"}
        facts |= _facts(metas[0]) if metas else {}
        forgotten = sum(event.what in _FORGOTTEN for event in item.history())
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in paths}
    return Index(kind, files, facts, forgotten)


def _metas(ledger: Ledger | StatisticsLedger) -> list[DeltaMeta]:
    """Origins of the ledger's deltas, without shards' names."""
    if isinstance(ledger, StatisticsLedger):
        return [ledger.statistics().meta.delta] if len(ledger) else []
    return [meta for meta in ledger.origins().values() if meta is not None]


def _facts(meta: DeltaMeta) -> dict[str, str]:
    facts = {"anchor": meta.anchor, "model": meta.model, "trainable": meta.trainable}
    return facts | ({} if meta.loss is None else {"loss": meta.loss})


def _refuse_history(index: Index, before: Index | None, repo_id: str, keep: bool) -> None:
    if before is None or keep or before.kind != "ledger" or index.kind != "ledger":
        return
    if index.forgotten != before.forgotten:
        raise LedgerError(
            f"the ledger has forgotten something since it was pushed to {repo_id}, whose history "
            "would keep it: delete the repository (hf repos delete), or push to a new one; or "
            "pass keep_forgotten=True and squash the history afterwards "
            "(HfApi().super_squash_history)"
        )


def _read_index(folder: Path) -> Index:
    if not (folder / INDEX).is_file():
        raise DeltaFileError(f"{folder} has no {INDEX}: save_pretrained writes such a folder")
    return _parsed(folder / INDEX)


def _parsed(path: Path, *, check_names: bool = True) -> Index:
    """The index in a file, which somebody else may have written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["version"]
        if version != VERSION:
            raise DeltaFileError(
                f"{path} has format version {version}, this release reads {VERSION}: update "
                "tangent-ops"
            )
        index = Index(**found)
        named = all(isinstance(sha256, str) for sha256 in index.files.values())
        right = named and index.kind in _KINDS and isinstance(index.forgotten, int)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DeltaFileError(f"{path} is not an index of tangent-ops: {error}") from error
    foreign = [name for name in index.files if not _FILES.fullmatch(name)]
    if not right or (foreign and check_names):
        what = f"it names {foreign[0]!r}" if foreign else "a field has a wrong type"
        raise DeltaFileError(f"{path} is not an index of tangent-ops: {what}")
    return index


def _check(meta: DeltaMeta, anchor: str | None, folder: Path) -> None:
    if anchor is not None:
        check_anchor(meta, anchor, "as given", str(folder))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DeltaFileError(f"{path} is missing: pull it again, or restore a copy") from error


def _card(index: Index) -> str:
    """A model card; its licence is left to the owner."""
    rows = "\n".join(f"| {name} | `{value}` |" for name, value in index.facts.items())
    return (
        "---\nlibrary_name: tangent-ops\ntags:\n- tangent-ops\n---\n\n"
        f"# A {index.kind} of tangent-ops\n\n"
        "It belongs to one anchor, the frozen model with this fingerprint, and to no other.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        "```python\nimport tangent_ops\n\n"
        f'{index.kind} = tangent_ops.pull_from_hub("REPOSITORY"'
        + (', folder="ledger"' if index.kind == "ledger" else "")
        + ")\n```\n\n"
        "The licence, and what the data were, is for the owner to say.\n"
    )


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            "push_to_hub and pull_from_hub need huggingface_hub: pip install "
            '"tangent-ops[huggingface]". save_pretrained writes a folder without it'
        ) from error
    return huggingface_hub
