"""`Plan`: a run's folder, and what is to be trained in it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from tangent_ops.checks import suggestion
from tangent_ops.errors import ArgumentError, PlanError
from tangent_ops.files import copy_atomically, to_json
from tangent_ops.model.core_basis import CoreBasis
from tangent_ops.model.linearize import linearize
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.shards.anchor import AnchorInfo, load_anchor, read_anchor
from tangent_ops.shards.basis_file import load_basis, save_basis
from tangent_ops.shards.data import ImageData, Samples
from tangent_ops.shards.disjoint import (
    check_disjoint,
    check_no_copies,
    check_private,
    check_public,
    check_validation,
)
from tangent_ops.shards.jobs import Job, Shard, job_hash
from tangent_ops.shards.manifest import Manifest, Sample
from tangent_ops.shards.plan_change import plan_change
from tangent_ops.shards.public import public_basis, public_digest
from tangent_ops.shards.recipe import ShardRecipe
from tangent_ops.shards.recorded import AUTOMATIC, WEIGHTS, Recorded
from tangent_ops.shards.rows import Rows, changes, check_names, difference, digest, hashed, rows_of
from tangent_ops.shards.run_folder import (
    ANCHOR,
    BASIS,
    DATABASE,
    DELTAS,
    LEDGER,
    STATISTICS,
    check_folder,
    locked,
)


class Plan(Recorded):
    """A folder with the anchor, the recipe, which sample is in which shard, and the deltas.

    A delta's file is named by the hash of what determines it: the anchor's fingerprint, the recipe,
    the shard's name, and the ids, classes and contents of its samples. So a shard is done if its
    file exists. After a process has died or a sample was removed, only that shard is trained again.

    Made by `create`, opened by `open`.
    """

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        anchor: str | os.PathLike[str],
        data: ImageData,
        recipe: ShardRecipe,
        assignment: Mapping[str, Sequence[str]],
        labels: Mapping[str, str] | None = None,
        public: ImageData | None = None,
        validation: ImageData | None = None,
        allow_overlap: bool = False,
        progress: bool = True,
    ) -> Plan:
        """Write a plan, or open it if the folder already holds the same one.

        Every sample of a new plan is read once, to hash it. If the plan exists and names another
        place for its images, the data are compared with it as in `relocate`.

        Args:
            path: the folder, which is new, empty, or that of this plan.
            anchor: a file of `save_anchor`, which is copied.
            data: where the samples are.
            recipe: how each shard is trained.
            assignment: shard -> ids of its samples; see `by_hash`, `by_class`, `by_column`.
            labels: id -> a label that samples can be forgotten by, for example a customer.
            public: images that the anchor was made from, and that the method "statistics" needs for
                its basis. None of them may be among the samples, because what anchor and basis
                learned from them cannot be forgotten.
            validation: labelled images that accuracies are measured on. None of them may be among
                the samples. If the plan exists, they replace its former ones; None keeps these.
            allow_overlap: let shards share samples, or copies of them. Forgetting one then changes
                all shards that have it, and the shards' privacy guarantees no longer compose in
                parallel. The plan records this option.
            progress: show a bar.

        Raises:
            ArgumentError: an assignment not as above; a sample in two shards; data of one class;
                the method "statistics" without public images.
            SampleError: a sample cannot be read.
            PlanError: the folder holds something else, or another plan; anchor is not an anchor's
                file.
            OSError: the folder cannot be written.
        """
        path = Path(path).absolute()
        data = data.absolute()  # workers and later commands may run in another folder
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
        if recipe.method == "statistics":
            asked["public"] = public_digest(public)
        if (path / DATABASE).exists():
            plan = cls.open(path)
            plan._check_same(asked, rows)
            if data != plan.data:
                plan.relocate(data, progress=progress)
            if validation is not None:
                plan.set_validation(validation)
            return plan
        check_folder(path)
        check_private(recipe, assignment, allow_overlap)

        shards: dict[str, list[Sample]] = {name: [] for name in assignment}
        for shard, sample in hashed(samples, rows, progress):
            shards[shard].append(sample)
        if public is not None:
            check_public(public.open(), shards)
        if validation is not None:
            check_validation(validation.open().with_classes(info.classes), shards)
        if not allow_overlap:
            check_disjoint(shards)
        if recipe.dp_epsilon is not None:
            check_no_copies(shards)
        path.mkdir(parents=True, exist_ok=True)
        copy_atomically(Path(anchor), path / ANCHOR)
        rest = {"dealt": digest(rows), "data": to_json(asdict(data)), "weights": WEIGHTS[0]}
        if validation is not None:
            rest["validation"] = to_json(asdict(validation.absolute()))
        if recipe.method == "statistics" and public is not None:
            basis = public_basis(path / ANCHOR, recipe, public)
            save_basis(basis, path / BASIS)
            rest |= {"basis": basis.fingerprint, "l2": AUTOMATIC}
        (path / _results(recipe)).mkdir(exist_ok=True)
        Manifest(path / DATABASE).create({**asked, **rest}, shards)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Plan:
        """Open a run's folder.

        Raises:
            FileNotFoundError: the folder holds no plan.
            PlanError: it is damaged, or was edited.
        """
        path = Path(path).absolute()
        if not (path / DATABASE).is_file():
            there = f"holds no plan of shards, {DATABASE}" if path.exists() else "does not exist"
            raise FileNotFoundError(f"{path} {there}: give a run's folder, which finetune writes")
        plan = cls(path)
        plan.manifest.check()
        if plan.anchor_info.fingerprint != plan._about["anchor"]:
            raise PlanError(f"{path / ANCHOR} is not the anchor of the plan: restore it")
        _ = plan.recipe, plan.data, plan.validation, plan.overlap, plan.weights, plan.l2
        return plan

    @property
    def anchor_path(self) -> Path:
        return self.path / ANCHOR

    @property
    def ledger_path(self) -> Path:
        return self.path / LEDGER

    @property
    def results_path(self) -> Path:
        """The folder of what the jobs write: deltas or statistics."""
        return self.path / _results(self.recipe)

    @cached_property
    def anchor_info(self) -> AnchorInfo:
        return read_anchor(self.anchor_path)

    @cached_property
    def basis(self) -> CoreBasis | None:
        """The cores' fixed sides, with the method "statistics"."""
        if self.recipe.method != "statistics":
            return None
        basis = load_basis(self.path / BASIS)
        if basis.fingerprint != self._about["basis"]:
            raise PlanError(f"{self.path / BASIS} is not the basis of the plan: restore it")
        return basis

    def tangent(self) -> LinearizedModel:
        """The anchor, linearized by the recipe, on the CPU.

        Raises:
            PlanError: the anchor's file, or the basis's, is damaged.
        """
        model, _ = load_anchor(self.anchor_path)
        recipe = self.recipe
        if self.basis is not None:
            return linearize(model, core=self.basis)
        tangent = linearize(model, recipe.trainable(model), rank=recipe.rank, basis=recipe.basis)
        if recipe.grad_checkpointing:
            tangent.set_grad_checkpointing()
        return tangent

    def shards(self) -> list[Shard]:
        """All shards, in their order."""
        there = {path.name for path in self.results_path.glob("*.safetensors")}
        found = []
        for name, samples in self.manifest.samples():
            job = self._hash(name, samples) if samples else None
            done = job is not None and self.result_path(job).name in there
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
        known = [name for name, samples in self.manifest.samples() if samples]
        raise ArgumentError(
            f"{self.path} has no shard {shard!r} with samples"
            f"{suggestion(shard, known, 'shards with samples')}"
        )

    def relocate(
        self,
        data: ImageData,
        *,
        without: Mapping[str, Sequence[str]] | None = None,
        dry_run: bool = False,
        progress: bool = True,
    ) -> None:
        """Set the place of the images, after every sample's hash was compared with the plan's.

        Args:
            data: where the images are now.
            without: shard -> ids of samples that need not be there, because they will be forgotten.
            dry_run: compare only.
            progress: show a bar.

        Raises:
            PlanError: images are missing there, or differ. Nothing was changed.
        """
        data = data.absolute()
        if found := difference(data, self.staying(without or {}), progress):
            raise PlanError(
                f"the run {self.path} was made from the images in {self.data.root}, and these "
                f"differ: {found}. Nothing was changed: give the folder to which the images were "
                "moved, or begin a new run in another folder"
            )
        if not dry_run:
            self.manifest.set_data(to_json(asdict(data)))
            self.data = data

    def set_validation(self, data: ImageData) -> None:
        """Set the images that accuracies are measured on.

        Raises:
            ArgumentError: there is no such folder, a class is not the run's, or an image is among
                the run's samples. Nothing was changed.
        """
        data = data.absolute()
        if data != self.validation:
            samples = data.open().with_classes(self.anchor_info.classes)
            check_validation(samples, dict(self.manifest.samples()))
            self.manifest.set_validation(to_json(asdict(data)))
            self._about["validation"] = to_json(asdict(data))
            self.validation = data

    def staying(
        self, without: Mapping[str, Sequence[str]], shards: Collection[str] | None = None
    ) -> list[Sample]:
        """The samples of all shards, or of the given ones, except ``without`` (shard -> ids)."""
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
        """Shard -> ids of samples and their exact copies, or of all samples with a label.

        Raises:
            ArgumentError: a sample or the label is not in the plan, or not exactly one is given.
        """
        if (sample is None) == (label is None):
            raise ArgumentError("give one of sample and label")
        samples = [sample] if sample is None or isinstance(sample, str) else sample
        found: dict[str, set[str]] = {}
        for one in samples:
            here = self.manifest.find(one, label)
            if not here:
                what = f"sample {one!r}" if label is None else f"sample with the label {label!r}"
                near = self.manifest.suggestion(one, label)
                raise ArgumentError(f"{self.path} has no {what}, or it was forgotten{near}")
            for shard, ids in here.items():
                found.setdefault(shard, set()).update(ids)
        return {shard: sorted(ids) for shard, ids in found.items()}

    def _hash(self, shard: str, samples: list[Sample]) -> str:
        basis = self._about.get("basis")
        return job_hash(shard, samples, self.anchor_info, self.recipe, basis)

    def result_path(self, job: str) -> Path:
        """The file of a job's delta or statistics."""
        return self.results_path / f"{job[:32]}.safetensors"

    def locked(self) -> AbstractContextManager[None]:
        """Hold the run's lock, to train, settle or forget; see `run_folder.locked`."""
        return locked(self.path)

    def check_same(
        self,
        recipe: ShardRecipe,
        samples: Samples,
        assignment: Mapping[str, Sequence[str]],
        labels: Mapping[str, str],
        allow_overlap: bool,
    ) -> None:
        """Raise PlanError, as `create` does, if the plan has another recipe, overlap or samples."""
        info = self.anchor_info
        samples = samples.with_classes(info.classes)
        rows = rows_of(samples, assignment, labels, info.options["num_classes"])
        asked = {"recipe": to_json(recipe.to_dict()), "overlap": to_json(allow_overlap)}
        self._check_same(asked, rows)

    def _check_same(self, asked: Mapping[str, str], rows: Rows) -> None:
        for key, value in asked.items():
            there = self._about.get(key, "none")
            if there != value:
                change = plan_change(key, there, value)
                raise PlanError(
                    f"{self.path} holds a plan with {change}. Give the same options to go on with "
                    "it, or another folder to start a new one"
                )
        if digest(rows) == self._about["dealt"]:
            return
        new, gone = changes(rows, self.manifest.samples())
        if new or gone:
            raise PlanError(
                f"{self.path} holds a plan of other samples, or with another assignment: {new} are "
                f"new, {gone} are gone. Give another folder to start a new one; to take samples "
                "out of this one, forget them"
            )


def _results(recipe: ShardRecipe) -> str:
    return STATISTICS if recipe.method == "statistics" else DELTAS
