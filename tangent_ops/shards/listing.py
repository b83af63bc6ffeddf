"""The images of a folder that holds a folder of images for each class: all of them, or an error."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tangent_ops.errors import ArgumentError
from tangent_ops.shards.decode import FORMATS

SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# Image formats that are not read. They are an error, because they would else be left out silently.
OTHER_SUFFIXES = frozenset(
    (
        *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".ico", ".svg"),
        *(".tga", ".pcx", ".psd", ".eps", ".exr", ".hdr", ".pfm", ".dds", ".dcm", ".qoi", ".dib"),
        *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),
    )
)
READ = "Formats are " + ", ".join(f"{name} ({', '.join(ends)})" for name, ends in FORMATS.items())


class Listing(NamedTuple):
    """The samples of some data: ids, class indices, and the classes' names where they are known."""

    ids: list[str]
    targets: list[int]
    classes: Sequence[str] = ()
    passed_over: Sequence[str] = ()  # files that are not images, judging by their names


def list_images(root: Path) -> Listing:
    """Images below a folder; a class has the name of the folder that its images are in.

    Ids are paths in the folder. They, and the classes, are in natural order: 2 before 10.

    Raises:
        ArgumentError: there are no images; some lie in no class's folder, or are in formats that
            are not read; a folder has no images; or two folders have one class's name.
    """
    from timm.utils.misc import natural_key

    places: dict[str, str] = {}  # class -> its folder
    ids: list[str] = []
    passed_over: list[str] = []
    for path, folders, files in os.walk(root, followlinks=True):
        folder = os.path.relpath(path, root).replace(os.sep, "/")
        prefix = "" if folder == "." else f"{folder}/"
        images = [name for name in sorted(files) if _is_image(path, name)]
        passed_over += [prefix + name for name in {*files} - {*images} if not _hidden(name)]
        if images and not prefix:
            raise ArgumentError(
                f"{root / images[0]} is in no class's folder: expected a folder of images for each "
                f"class, as {root / 'CLASS' / images[0]}"
            )
        if images:
            name = os.path.basename(folder)
            if places.setdefault(name, folder) != folder:
                raise ArgumentError(
                    f"{root} has two folders of a class {name!r}, {places[name]} and {folder}: "
                    "give one of the folders they are in, or put their images into one"
                )
            ids += [prefix + name for name in images]
        elif prefix and not any(map(_hidden, folder.split("/"))) and all(map(_hidden, folders)):
            raise ArgumentError(
                f"{root / folder} holds no image, so it is not a class: fill or remove it. {READ}"
            )
    if not ids:
        raise ArgumentError(f"{root} holds no images: expected a folder for each class. {READ}")
    ids.sort(key=lambda id: (natural_key(id), id))
    classes = sorted(places, key=lambda name: (natural_key(name), name))
    numbers = {name: index for index, name in enumerate(classes)}
    return Listing(ids, [numbers[id.split("/")[-2]] for id in ids], classes, sorted(passed_over))


def list_unlabelled(root: Path) -> Listing:
    """Images below a folder, in any folders, without classes; hidden files are left out.

    Raises:
        ArgumentError: there are no images, or some are in formats that are not read.
    """
    from timm.utils.misc import natural_key

    ids: list[str] = []
    passed_over: list[str] = []
    for path, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not _hidden(name)]
        folder = os.path.relpath(path, root).replace(os.sep, "/")
        prefix = "" if folder == "." else f"{folder}/"
        for name in filter(lambda name: not _hidden(name), files):
            (ids if _is_image(path, name) else passed_over).append(prefix + name)
    if not ids:
        raise ArgumentError(f"{root} holds no images. {READ}")
    ids.sort(key=lambda id: (natural_key(id), id))
    return Listing(ids, [0] * len(ids), (), sorted(passed_over))


def _is_image(folder: str, name: str) -> bool:
    """Whether it is an image, by its name; ArgumentError for formats that are not read."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in OTHER_SUFFIXES:
        raise ArgumentError(
            f"{os.path.join(folder, name)} is in no format that is read: convert it, or move it "
            f"away. {READ}"
        )
    return suffix in SUFFIXES


def _hidden(name: str) -> bool:
    return name.startswith(".")
