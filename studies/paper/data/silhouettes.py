"""Animal-MNIST: 10 kinds of animals as white silhouettes of 28 x 28, without its duplicates."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from assets import Asset, DemoError, fetch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from studies.paper.data.pickles import load_array
from studies.paper.data.pool import Pool, Source

DATA = Asset(
    requirement="animal-mnist==0.4",
    wheel_sha256="aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    member="animal_mnist/data/Animal_MNIST/animal_data_version_3.gz",
    member_sha256="68a30346781a0984f839463a4615d2decb899d1ce65091bb92586311754a34ce",
)
LABELS = replace(
    DATA,
    member="animal_mnist/data/Animal_MNIST/animal_label_version_3.gz",
    member_sha256="dec8dba7c469830989fbab46825021a08a38470753a512f27ada847eced97b57",
)
CLASSES = (
    *("bear", "bird", "cat", "cow", "dog"),
    *("elephant", "giraffe", "horse", "sheep", "zebra"),
)
ALIKE = 0.95  # correlation of two images' pixels; looked at: the same drawing from there on


def load_silhouettes(cache: Path) -> Pool:
    """All images, one of each group of images that are alike.

    Raises:
        DemoError: The package could not be had, or holds something else.
    """
    pixels, targets = (
        load_array(gzip.decompress(fetch(asset, cache).read_bytes())) for asset in (DATA, LABELS)
    )
    if pixels.shape != (10_000, 28, 28) or targets.shape != (10_000,):
        raise DemoError(f"Animal-MNIST: shapes {pixels.shape} and {targets.shape}")
    kept = distinct(pixels.reshape(len(pixels), -1))
    return Pool(
        "silhouettes",
        torch.from_numpy(pixels[kept])[:, None],
        torch.from_numpy(targets[kept].astype(np.int64)),
        CLASSES,
    )


def source() -> Source:
    note = f"the first of each group of images that correlate by more than {ALIKE}"
    return Source("PyPI animal-mnist==0.4", "MIT", DATA.wheel_sha256, note)


def distinct(images: np.ndarray, alike: float = ALIKE, rows: int = 2000) -> np.ndarray:
    """Indices of the first image of each group, in order; chains of alike images are one group.

    Args:
        images: (count, pixels).
        alike: Images whose correlation is higher are alike.
        rows: Of the matrix of correlations that are in memory at a time.
    """
    flat = images.astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    pairs = [
        np.add(np.nonzero(flat[start : start + rows] @ flat.T > alike), [[start], [0]])
        for start in range(0, len(flat), rows)
    ]
    first, second = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(len(flat), len(flat)))
    _, group = connected_components(graph, directed=False)
    return np.sort(np.unique(group, return_index=True)[1])
