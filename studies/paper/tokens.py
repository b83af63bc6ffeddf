"""What enters the last blocks, of every image of a set: computed once, kept in files."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assets import VIT_SMALL, fetch
from backbone import IMAGE_SIZE, load_backbone
from images import stratified
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

from studies.paper.data.pool import Pool
from studies.paper.data.sets import SETS
from tangent_ops import CachedFeatures
from tangent_ops.model.features import Tail

FEATURES = 0  # the depth whose "tokens" enter the classifier, (count, 384)
BATCH = 64
TEST_SEED = 20_240_501  # of the draw of test images, which is one for all seeds


@dataclass(frozen=True)
class Prepared:
    """A set, test images first.

    Attributes:
        name: The set's, in `SETS`.
        depths: Depth -> memory-mapped array, (count, 50, 384), or (count, 384) for `FEATURES`.
        shifted: The same of the shifted test images; empty if there are none.
        targets: (count,) int64.
        test: How many are test images.
        classes: Class names.
        drawings: How many consecutive images are of one thing.
    """

    name: str
    depths: dict[int, np.ndarray]
    shifted: dict[int, np.ndarray]
    targets: Tensor
    test: int
    classes: list[str]
    drawings: int = 1

    def rows(self, depth: int, indices: Tensor) -> CachedFeatures:
        """Tokens and classes of some images, in memory."""
        values = torch.from_numpy(self.depths[depth][indices.numpy()])
        return CachedFeatures(values, self.targets[indices])

    def tested(self, depth: int) -> CachedFeatures:
        return self.rows(depth, torch.arange(self.test))

    def tested_shifted(self, depth: int) -> CachedFeatures:
        values = torch.from_numpy(np.array(self.shifted[depth]))
        return CachedFeatures(values, self.targets[: self.test])

    def drawn(self, seed: int, sizes: list[int]) -> list[Tensor]:
        """Disjoint stratified draws from what are no test images: indices of each."""
        parts = draw(self.targets[self.test :], sizes, seed, self.drawings)
        return [part + self.test for part in parts]


def prepare(name: str, depths: tuple[int, ...], cache: Path, device: str = "cpu") -> Prepared:
    """Compute, or find, the tokens of a set.

    Args:
        name: In `SETS`.
        depths: How many blocks from the end; `FEATURES` comes along.
        cache: Folder for packages and tokens.
        device: Where the frozen blocks run.
    """
    chosen = SETS[name]
    folder = cache / "study" / f"{name}-{_key(name, depths)}"
    if not (folder / "set.json").exists():
        _compute(name, depths, cache, folder, device)
    known = json.loads((folder / "set.json").read_text(encoding="utf-8"))

    def arrays(prefix: str) -> dict[int, np.ndarray]:
        return {
            depth: np.load(folder / f"{prefix}{depth}.npy", mmap_mode="r")
            for depth in (FEATURES, *depths)
        }

    shifted = {} if chosen.shifted is None else arrays("shifted-")
    targets = torch.from_numpy(np.load(folder / "targets.npy"))
    classes = known["classes"]
    return Prepared(name, arrays(""), shifted, targets, chosen.test, classes, chosen.drawings)


def draw(targets: Tensor, sizes: list[int], seed: int, drawings: int = 1) -> list[Tensor]:
    """Disjoint stratified draws of images: no two of them share a thing.

    Args:
        targets: Class indices, (count,) int64; those of one thing are consecutive.
        sizes: Images in each draw; of a draw's last thing, what is too many is left out.
        seed: Of the draw.
        drawings: Images of each thing.

    Raises:
        DemoError: There are too few things.
    """
    things = stratified(targets[::drawings], [-(-size // drawings) for size in sizes], seed)
    images = [(part[:, None] * drawings + torch.arange(drawings)).flatten() for part in things]
    return [part[:size] for part, size in zip(images, sizes, strict=True)]


def load_model(cache: Path) -> Any:
    """The backbone, without a classifier."""
    return load_backbone(fetch(VIT_SMALL, cache))


def class_token_tail(model: Any, depth: int, classes: int) -> Tail:
    """The last blocks, the norm and a new classifier of zeros: tokens -> logits.

    Args:
        model: timm's VisionTransformer with token pooling; what the tail uses is copied.
        depth: Blocks, at least 1.
        classes: Outputs; 0 for what enters a classifier.
    """
    start = len(model.blocks) - depth
    frozen = (model.patch_embed, *model.blocks[:start])
    copied = copy.deepcopy(model, {id(part): nn.Identity() for part in frozen})
    copied.reset_classifier(classes)
    for parameter in copied.head.parameters():
        nn.init.zeros_(parameter)
    return Tail(copied, start)


@torch.no_grad()
def tokens_of(
    model: Any, pool: Pool, rows: Tensor, depths: tuple[int, ...], device: str
) -> dict[int, np.ndarray]:
    """What enters the last `depth` blocks, for each depth, and the classifier."""
    config = resolve_model_data_config(model)
    model = model.to(device)
    ends = {depth: class_token_tail(model, depth, 0).to(device).eval() for depth in depths[:1]}
    starts = {len(model.blocks) - depth: depth for depth in depths}
    found: dict[int, list[Tensor]] = {depth: [] for depth in (FEATURES, *depths)}
    for part in tqdm(rows.split(BATCH), f"{pool.name}: frozen blocks", unit="batch", delay=1):
        tokens = pool.inputs(part, IMAGE_SIZE, config["mean"], config["std"]).to(device)
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(tokens))))
        for number, block in enumerate(model.blocks):
            if number in starts:
                found[starts[number]].append(tokens.cpu())
            if number == len(model.blocks) - depths[0]:
                found[FEATURES].append(ends[depths[0]](tokens).cpu())
            if number == max(starts):
                break  # no number needs what follows
            tokens = block(tokens)
    return {depth: torch.cat(parts).numpy() for depth, parts in found.items()}


def _compute(name: str, depths: tuple[int, ...], cache: Path, folder: Path, device: str) -> None:
    chosen = SETS[name]
    pool, model = chosen.load(cache), load_model(cache)
    rows = torch.cat(draw(pool.targets, [chosen.test, chosen.pool], TEST_SEED, chosen.drawings))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tokens-", dir=folder.parent) as temporary:
        part = Path(temporary) / "part"
        part.mkdir()
        np.save(part / "targets.npy", pool.targets[rows].numpy())
        for depth, values in tokens_of(model, pool, rows, depths, device).items():
            np.save(part / f"{depth}.npy", values)
        if chosen.shifted is not None:
            other = chosen.shifted(cache)
            tested = rows[: chosen.test]
            for depth, values in tokens_of(model, other, tested, depths, device).items():
                np.save(part / f"shifted-{depth}.npy", values)
        described = {"name": pool.name, "classes": list(pool.classes)}
        (part / "set.json").write_text(json.dumps(described), encoding="utf-8")
        os.replace(part, folder)


def _key(name: str, depths: tuple[int, ...]) -> str:
    """Of all that the tokens depend on."""
    chosen = SETS[name]
    made_of = [chosen.source(), chosen.test, chosen.pool, depths, TEST_SEED, IMAGE_SIZE]
    made_of += [VIT_SMALL.member_sha256, chosen.shifted_source and chosen.shifted_source()]
    if chosen.drawings > 1:  # what is kept of other sets keeps its name
        made_of.append(chosen.drawings)
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
