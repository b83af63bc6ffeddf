"""`Plan`: a run's folder, and what is to be trained in it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tangent_ops.errors import ArgumentError, PlanError
from tangent_ops.files import to_json, write_atomically
from tangent_ops.model.linearize import linearize
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.shards.anchor import AnchorInfo, load_anchor, read_anchor
from tangent_ops.shards.data import ImageData, Samples
from tangent_ops.shards.disjoint import check_disjoint, check_private, check_public
from tangent_ops.shards.manifest import Manifest, Sample
from tangent_ops.shards.recipe import Recipe
from tangent_ops.shards.rows import Rows, check_names, difference, digest, hashed, rows_of

WEIGHTS = ("uniform", "samples")
DATABASE = "plan.sqlite"
ANCHOR = "anchor.safetensors"


@dataclass(frozen=True)
class Shard:
    """A part of the data.

    Attributes:
        name: of your choice.
        samples: how many.
        job: hash of all that determines its delta, in hexadecimal; None if it has no samples.
        done: whether that delta is there.
    """

    name: str
    samples: int
    job: str | None
    done: bool


@dataclass(frozen=True)
class Job:
    """What a worker trains."""

    shard: str
    hash: str
    samples: tuple[Sample, ...]


class Plan:
    """A folder with the anchor, the recipe, which sample is in which shard, and the deltas.

    A delta's file is named by the hash of what determines it: the anchor's fingerprint, the recipe,
    the shard's name, and the ids, classes and contents of its samples. So a shard is done if the
    file is there; whoever loses a process, or a sample, trains that shard anew and no other.

    Made by `create`, opened by `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest(path / DATABASE)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        anchor: str | os.PathLike[str],
        data: ImageData,
        recipe: Recipe,
        assignment: Mapping[str, Sequence[str]],
        labels: Mapping[str, str] | None = None,
        public: ImageData | None = None,
        allow_overlap: bool = False,
        progress: bool = True,
    ) -> Plan:
        """Write a plan; or open it, if the folder holds this one already.

        Every sample is read once, to hash it. Where the plan is there, and data are in another
        place than its own, they are compared with it, as `relocate` does.

        Args:
            path: the folder; a new or an empty one, or that of this plan.
            anchor: a file of `save_anchor`, which is copied.
            data: where the samples are.
            recipe: how each shard is trained.
            assignment: shard -> ids of its samples; see `by_hash`, `by_class`, `by_column`.
            labels: id -> whom or what it is forgotten by, a customer say.
            public: images that the anchor was made from. None of them may be among the samples:
                what the anchor knows, nobody can take out of it.
            allow_overlap: let shards share samples, or copies of them. Forgetting one then takes
                all shards that have it; that shards' privacy does not add up no longer holds. The
                plan records it.
            progress: show a bar.

        Raises:
            ArgumentError: an assignment other than this; a sample in two shards; data of one class.
            SampleError: a sample that cannot be read.
            PlanError: the folder holds something else, or a plan of other images; anchor is no
                anchor's file.
            OSError: the folder cannot be written.
        """
        path = Path(path).absolute()
        data = data.absolute()  # workers, and the next command, may be elsewhere
        info = read_anchor(anchor)
        check_names(assignment)
        samples = data.open().with_classes(info.classes)
        samples.check_classes(data.root)
        rows = rows_of(samples, assignment, labels or {}, info.options["num_classes"])
        asked = {
            "anchor": info.fingerprint,
            "recipe": to_json(recipe.to_dict()),
            "overlap": to_json(allow_overlap),
        }
        if (path / DATABASE).exists():
            plan = cls.open(path)
            plan._check_same(asked, rows)
            if data != plan.data:
                plan.relocate(data, progress=progress)
            return plan
        check_folder(path)

        shards: dict[str, list[Sample]] = {name: [] for name in assignment}
        for shard, sample in hashed(samples, rows, progress):
            shards[shard].append(sample)
        if public is not None:
            check_public(public.open(), shards)
        if not allow_overlap:
            check_disjoint(shards)
        if recipe.dp_epsilon is not None:
            check_private(recipe, shards, allow_overlap)
        path.mkdir(parents=True, exist_ok=True)
        with open(anchor, "rb") as source:
            write_atomically(path / ANCHOR, lambda file: shutil.copyfileobj(source, file))
        (path / "deltas").mkdir(exist_ok=True)
        rest = {"dealt": digest(rows), "data": to_json(asdict(data)), "weights": WEIGHTS[0]}
        Manifest(path / DATABASE).create({**asked, **rest}, shards)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Plan:
        """Open a run's folder.

        Raises:
            FileNotFoundError: there is none.
            PlanError: it is damaged, or was edited.
        """
        path = Path(path).absolute()
        if not (path / DATABASE).is_file():
            raise FileNotFoundError(f"{path} holds no plan of shards: there is no {DATABASE}")
        plan = cls(path)
        plan.manifest.check()
        if plan.anchor_info.fingerprint != plan._about["anchor"]:
            raise PlanError(f"{path / ANCHOR} is not the anchor of the plan: restore it")
        _ = plan.recipe, plan.data, plan.overlap, plan.weights
        return plan

    @property
    def anchor_path(self) -> Path:
        return self.path / ANCHOR

    @property
    def ledger_path(self) -> Path:
        return self.path / "ledger"

    @property
    def deltas_path(self) -> Path:
        return self.path / "deltas"

    @cached_property
    def anchor_info(self) -> AnchorInfo:
        return read_anchor(self.anchor_path)

    @cached_property
    def recipe(self) -> Recipe:
        values = self._value("recipe")
        try:
            return Recipe.from_dict(values)
        except (ArgumentError, TypeError, AttributeError) as error:
            raise PlanError(f"{self.path} has a damaged recipe: {error}") from error

    @cached_property
    def data(self) -> ImageData:
        values = self._value("data")
        try:
            return ImageData(**values)
        except (ArgumentError, TypeError) as error:
            raise PlanError(f"{self.path} has a damaged data source: {error}") from error

    @cached_property
    def overlap(self) -> bool:
        """Whether shards may share samples."""
        return self._value("overlap") is True

    @property
    def weights(self) -> str:
        """Of the shards in the mean: what `settle` was last asked for, or else uniform."""
        found = self.manifest.about()["weights"]
        if found not in WEIGHTS:
            raise PlanError(f"{self.path / DATABASE} has weights {found!r}: it was edited")
        return found

    def tangent(self) -> LinearizedModel:
        """The anchor, linearized by the recipe, on the CPU.

        Raises:
            PlanError: the anchor's file is damaged.
        """
        model, _ = load_anchor(self.anchor_path)
        recipe = self.recipe
        tangent = linearize(model, recipe.trainable(model), rank=recipe.rank, basis=recipe.basis)
        if recipe.grad_checkpointing:
            tangent.set_grad_checkpointing()
        return tangent

    def shards(self) -> list[Shard]:
        """All shards, in their order."""
        there = {path.name for path in self.deltas_path.glob("*.safetensors")}
        found = []
        for name, samples in self.manifest.samples():
            job = self._hash(name, samples) if samples else None
            done = job is not None and self.delta_path(job).name in there
            found.append(Shard(name, len(samples), job, done))
        return found

    def job(self, shard: str) -> Job:
        """What a shard's worker trains.

        Raises:
            ArgumentError: there is no such shard, or it has no samples.
        """
        for name, samples in self.manifest.samples(shard):
            if samples:
                return Job(name, self._hash(name, samples), tuple(samples))
        raise ArgumentError(f"{self.path} has no shard {shard!r} with samples")

    def relocate(
        self,
        data: ImageData,
        *,
        without: Mapping[str, Sequence[str]] | None = None,
        dry_run: bool = False,
        progress: bool = True,
    ) -> None:
        """Read the images in another place from now on, if they are the same there.

        Every sample is read, and its hash compared.

        Args:
            data: where the images are now.
            without: samples that need not be there, shard -> ids, as they are to be forgotten.
            dry_run: compare, and leave the plan as it is.
            progress: show a bar.

        Raises:
            PlanError: images are missing there, or are others. Nothing was changed.
        """
        data = data.absolute()
        if found := difference(data, self.staying(without or {}), progress):
            raise PlanError(
                f"the run {self.path} is of the images that were in {self.data.root}, and they are "
                f"not here: {found}. Nothing was changed: give the folder that they have moved "
                "to, or another one than the run's to begin a new run"
            )
        if not dry_run:
            self.manifest.set_data(to_json(asdict(data)))
            self.data = data

    def staying(
        self, without: Mapping[str, Sequence[str]], shards: Collection[str] | None = None
    ) -> list[Sample]:
        """The samples of all shards, or of these, without some of them (shard -> ids)."""
        gone = {shard: set(ids) for shard, ids in without.items()}
        return [
            sample
            for shard, samples in self.manifest.samples()
            if shards is None or shard in shards
            for sample in samples
            if sample.id not in gone.get(shard, ())
        ]

    def find(
        self, *, sample: str | Sequence[str] | None = None, label: str | None = None
    ) -> dict[str, list[str]]:
        """Where samples are, with exact copies of them, or all samples with a label.

        Returns:
            Shard -> ids.

        Raises:
            ArgumentError: there is none, or one of the samples is not there, or not one of the
                two is given.
        """
        if (sample is None) == (label is None):
            raise ArgumentError("give one of sample and label")
        samples = [sample] if sample is None or isinstance(sample, str) else sample
        found: dict[str, set[str]] = {}
        for one in samples:
            here = self.manifest.find(one, label)
            if not here:
                what = f"sample {one!r}" if label is None else f"sample with the label {label!r}"
                raise ArgumentError(f"{self.path} has no {what}: was it forgotten already?")
            for shard, ids in here.items():
                found.setdefault(shard, set()).update(ids)
        return {shard: sorted(ids) for shard, ids in found.items()}

    def delta_path(self, job: str) -> Path:
        """The file of a job's delta."""
        return self.deltas_path / f"{job[:32]}.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with the run: to train, to settle, or to forget.

        Raises:
            PlanError: another process is at work here; or a link leads out of the run's folder,
                where its files would be written and erased.
        """
        lock = self.path / ".lock"
        for path in (self.deltas_path, self.ledger_path, lock):
            if path.is_symlink():
                raise PlanError(
                    f"{path} is a symbolic link, and a run writes and erases in its own folder "
                    "alone: put the folder itself there, or move the run and link to it as a whole"
                )
        if lock.exists() and not lock.is_file():  # a pipe would wait
            raise PlanError(f"{lock} is no file: remove it")
        with open(lock, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PlanError(
                    f"another process is at work in {self.path}: wait for it"
                ) from error
            yield

    @cached_property
    def _about(self) -> dict[str, str]:
        found = self.manifest.about()
        needed = {"anchor", "recipe", "data", "overlap", "dealt", "weights"}
        if found.keys() != needed:
            raise PlanError(f"{self.path / DATABASE} lacks what a plan says of itself: restore it")
        return found

    def _value(self, key: str) -> Any:
        try:
            return json.loads(self._about[key])
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{self.path / DATABASE} has a damaged {key}: restore it") from error

    def _hash(self, shard: str, samples: Iterable[Sample]) -> str:
        return job_hash(shard, samples, self.anchor_info, self.recipe)

    def check_same(
        self,
        recipe: Recipe,
        samples: Samples,
        assignment: Mapping[str, Sequence[str]],
        labels: Mapping[str, str],
        allow_overlap: bool,
    ) -> None:
        """Raise PlanError where `create` would, as this plan is of something else."""
        info = self.anchor_info
        samples = samples.with_classes(info.classes)
        rows = rows_of(samples, assignment, labels, info.options["num_classes"])
        asked = {"recipe": to_json(recipe.to_dict()), "overlap": to_json(allow_overlap)}
        self._check_same(asked, rows)

    def _check_same(self, asked: Mapping[str, str], rows: Rows) -> None:
        for key, value in asked.items():
            if self._about[key] != value:
                raise PlanError(
                    f"{self.path} holds a plan with another {key}: give another folder to start "
                    f"a new one ({self._about[key][:300]} there, {value[:300]} now)"
                )
        if digest(rows) == self._about["dealt"]:
            return
        now = {(shard, id, target, label) for shard, id, target, label in rows}
        here = {
            (shard, sample.id, sample.target, sample.label)
            for shard, samples in self.manifest.samples()
            for sample in samples
        }
        if now != here:
            raise PlanError(
                f"{self.path} holds a plan of other samples, or of others in its shards: "
                f"{len(now - here)} are new, {len(here - now)} are gone. Give another folder to "
                "start a new one; to take samples out of this one, forget them"
            )


def check_folder(path: Path) -> None:
    """Raise PlanError for what is neither a plan's folder nor free to become one."""
    if (path / DATABASE).exists() or not path.exists():
        return
    if not path.is_dir() or any(map(_foreign, path.iterdir())):
        raise PlanError(f"{path} holds no plan, but other files: give a new or empty folder")


def _foreign(path: Path) -> bool:
    """Whether a file is none that an interrupted `create` leaves: the plan itself comes last."""
    empty = path.name == "deltas" and path.is_dir() and not any(path.iterdir())
    return not (empty or path.name == ANCHOR or path.suffix == ".tmp")


def job_hash(shard: str, samples: Iterable[Sample], anchor: AnchorInfo, recipe: Recipe) -> str:
    """SHA-256 of what determines a shard's delta, in hexadecimal."""
    head = {
        "format": 1,
        "anchor": anchor.fingerprint,
        "input": anchor.input,
        "recipe": recipe.to_dict(),
        "shard": shard,
    }
    digest = hashlib.sha256(to_json(head).encode() + b"\n")
    for sample in samples:
        digest.update(to_json([sample.id, sample.target, sample.content]).encode() + b"\n")
    return digest.hexdigest()
