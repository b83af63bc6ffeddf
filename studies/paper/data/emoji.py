"""Emoji of 64 x 64 pixels as Google (Noto) and Twitter (Twemoji) draw them, in 8 categories."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assets import DemoError
from PIL import Image
from torch import Tensor

from studies.paper.data.archives import Package, fetch_package, members, npm
from studies.paper.data.pool import Pool, Source

VERSION = "16.0.0"
PACKAGES = {
    "google": npm(
        "emoji-datasource-google",
        VERSION,
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "twitter": npm(
        "emoji-datasource-twitter",
        VERSION,
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
}
LICENCES = {"google": "Apache-2.0 (Noto Emoji)", "twitter": "CC-BY-4.0 (Twemoji)"}
LEFT_OUT = {"Flags", "Component"}  # drawn alike to the pixel; skin tones alone
SIDE = 64


def load_emoji(drawing: str, cache: Path) -> Pool:
    """The emoji that both draw, one of each (no skin tones), in the same order for both.

    Args:
        drawing: "google" or "twitter".
        cache: Folder for what is fetched.

    Raises:
        DemoError: A package could not be had, or lacks an image.
    """
    entries = listed(cache)
    classes = sorted({entry["category"] for entry in entries})
    targets = torch.tensor([classes.index(entry["category"]) for entry in entries])
    name = {"google": "Noto emoji", "twitter": "Twemoji"}[drawing]
    return Pool(name, pixels(drawing, entries, cache), targets, classes)


def pixels(drawing: str, entries: list[dict[str, Any]], cache: Path) -> Tensor:
    """The image of each entry, in their order: (count, 3, 64, 64) uint8.

    Raises:
        DemoError: The package could not be had, or lacks an image.
    """
    folder = f"package/img/{drawing}/{SIDE}/"
    wanted = {entry["image"] for entry in entries}
    package = fetch_package(PACKAGES[drawing], cache)
    found = {
        name.removeprefix(folder): _on_white(contents)
        for name, contents in members(package, lambda name: name.startswith(folder))
        if name.removeprefix(folder) in wanted
    }
    if missing := wanted - found.keys():
        raise DemoError(f"{package} lacks {len(missing)} images, {min(missing)} among them")
    stacked = np.stack([found[entry["image"]] for entry in entries])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


def source(drawing: str) -> Source:
    package: Package = PACKAGES[drawing]
    note = "on white; one of each identity that both draw; categories Flags and Component left out"
    return Source(f"npm {package.name}", LICENCES[drawing], package.sha256, note)


def listed(cache: Path) -> list[dict[str, Any]]:
    """What emoji.json says of every emoji that is kept, sorted by image name.

    Raises:
        DemoError: The package could not be had.
    """
    package = fetch_package(PACKAGES["google"], cache)
    contents = dict(members(package, lambda name: name == "package/emoji.json"))
    entries = json.loads(contents["package/emoji.json"])
    kept = [
        entry
        for entry in entries
        if entry["category"] not in LEFT_OUT
        and entry["has_img_google"]
        and entry["has_img_twitter"]
    ]
    return sorted(kept, key=lambda entry: entry["image"])


def _on_white(contents: bytes) -> np.ndarray:
    """(64, 64, 3) uint8."""
    image = Image.open(io.BytesIO(contents)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    flat = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    if flat.shape != (SIDE, SIDE, 3):
        raise DemoError(f"an emoji of shape {flat.shape}: expected {(SIDE, SIDE, 3)}")
    return flat
