"""Images with stable ids, in a folder or as timm.data reads them; no file is ever executed.

timm takes seconds to import, so this module and `anchor` import it only to read images or build a
model, which composing deltas and forgetting shards do not need.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tangent_ops.errors import ArgumentError, SampleError, UnsupportedError, in_words
from tangent_ops.shards.decode import decoded, to_rgb
from tangent_ops.shards.listing import Listing, list_images, list_unlabelled

# Those of timm's torchvision data sets that read images or arrays of numbers. Others unpickle.
TORCHVISION = ("mnist", "kmnist", "fashion_mnist", "places365", "inaturalist")

_WANTED = "give one that holds a folder of images for each class"


@dataclass(frozen=True)
class ImageData:
    """Where the images are, and how they are read.

    Images are converted to RGB without transparency. If a file has several, the first is taken.

    Attributes:
        root: the folder.
        name: the reader, as ``timm.data.create_dataset`` names it: "" for a folder with one
            folder of images per class; "torch/NAME" for torchvision, "hfds/NAME" for Hugging
            Face datasets, "wds/NAME" for webdataset, where these packages are installed.
        split: of the data set; for a folder a sub-folder of that name, if there is one.
    """

    root: str
    name: str = ""
    split: str = "train"

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if not isinstance(value, str) or "\0" in value:
                raise ArgumentError(f"{field} must be a string, got {value!r}")
        kind, _, rest = self.name.partition("/")
        if self.name and (kind not in ("torch", "hfds", "wds") or not rest):
            raise ArgumentError(
                f"name={self.name!r}: expected nothing for a folder of images, torch/NAME, "
                "hfds/NAME or wds/NAME"
            )
        if kind == "torch" and rest.lower() not in TORCHVISION:
            raise ArgumentError(
                f"name={self.name!r}: expected torch/ and one of {', '.join(TORCHVISION)}; "
                "others are read by unpickling, which can execute code in the file. Use hfds/NAME, "
                "or a folder of images"
            )

    def absolute(self) -> ImageData:
        """The same place, with an absolute root if the root exists."""
        return replace(self, root=os.path.abspath(self.root)) if os.path.exists(self.root) else self

    def open(self, config: Mapping[str, Any] | None = None, *, augment: bool = False) -> Samples:
        """List the samples.

        Args:
            config: how images are prepared, as ``timm.data.resolve_model_data_config`` gives it or
                `AnchorInfo.input` holds it; None for undecoded samples, to list and hash.
            augment: use timm's training transforms.

        Raises:
            ArgumentError: there is no such folder; or it holds no image, images outside of the
                classes' folders or in formats that are not read, a folder without images, or two
                folders of one name.
            UnsupportedError: the package that reads the data is not installed.
        """
        source = self._source()
        found = source.list()
        transform = _transform(config, augment)
        samples = Samples(source, found.ids, found.targets, found.classes, transform)
        samples.passed_over = found.passed_over
        return samples

    def unlabelled(self, config: Mapping[str, Any]) -> Samples:
        """All images below a folder, or a single image's file, with class 0 in place of a label.

        Args:
            config: as in `open`.

        Raises:
            ArgumentError: there is no such folder or file; or it holds no image, or images in
                formats that are not read.
        """
        path = Path(self.root)
        if path.is_file():
            source, found = _Folder(path.parent, ""), Listing([path.name], [0])
        else:
            source = _Folder(path, "", "give one that holds images, or an image's file")
            found = list_unlabelled(path)
        samples = Samples(source, found.ids, found.targets, (), _transform(config, False))
        samples.passed_over = found.passed_over
        return samples

    def pick(
        self,
        ids: Sequence[str],
        targets: Sequence[int],
        contents: Sequence[str],
        config: Mapping[str, Any] | None,
        *,
        augment: bool = False,
    ) -> Samples:
        """Samples of a plan; whenever one is read, its content is compared with its hash.

        Args:
            ids: of the samples.
            targets: their class indices.
            contents: their hashes.
            config: as in `open`.
            augment: as in `open`.
        """
        transform = _transform(config, augment)
        return Samples(self._source(), list(ids), list(targets), (), transform, list(contents))

    def _source(self) -> _Source:
        if not self.name:
            return _Folder(Path(self.root), self.split)
        kind = self.name.partition("/")[0]
        package = {"torch": "torchvision", "hfds": "datasets", "wds": "webdataset"}[kind]
        if importlib.util.find_spec(package) is None:
            raise UnsupportedError(f"{self.name} needs {package}: pip install {package}")
        return _Stream(self) if kind == "wds" else _Indexed(self)


class Samples(Dataset[tuple[Tensor, int]]):
    """Images and their class indices.

    Attributes:
        ids: each sample's path in the folder, or its position in the data set.
        targets: class indices.
        classes: names of the classes, where known.
        passed_over: files in the folder that are not images, judging by their names.

    A sample that cannot be read raises SampleError; no other sample takes its place.
    """

    def __init__(
        self,
        source: _Source,
        ids: list[str],
        targets: list[int],
        classes: Sequence[str],
        transform: Any,
        contents: list[str] | None = None,
    ) -> None:
        self.ids, self.targets, self.classes = ids, targets, list(classes)
        self.passed_over: Sequence[str] = ()
        self._source, self._transform, self._contents = source, transform, contents

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self.image(index)), self.targets[index]

    def image(self, index: int) -> Image.Image:
        """The sample in RGB, as it is in its file."""
        sample = self.ids[index]
        read = self._read(sample)
        if self._contents is not None and _digest(read) != self._contents[index]:
            raise SampleError(
                f"sample {sample!r} is not what it was when the plan was made: restore it, or "
                "forget it and add it under another name"
            )
        return decoded(read, sample)

    def size(self, index: int) -> int | None:
        """Bytes of the sample's file; None where there is no file, or it cannot be read."""
        if not isinstance(self._source, _Folder):
            return None
        try:
            return (self._source.root / self.ids[index]).stat().st_size
        except OSError:
            return None

    def content(self, index: int) -> str:
        """SHA-256 of the file's bytes, or of the pixels where there is no file."""
        return _digest(self._read(self.ids[index]))

    def check(self, index: int) -> None:
        """Raise SampleError unless the sample can be read and decoded."""
        decoded(self._read(self.ids[index]), self.ids[index])

    def counts(self) -> dict[str, int]:
        """Number of images by class name, or by class index where names are unknown."""
        found = Counter(self.targets)
        names = self.classes or [str(k) for k in range(max(found, default=-1) + 1)]
        return {name: found[index] for index, name in enumerate(names)}

    def check_classes(self, where: str) -> None:
        """Raise ArgumentError if all images are of one class.

        Args:
            where: name of the images' place, for the message.
        """
        there = [name for name, count in self.counts().items() if count]
        if len(there) < 2:
            raise ArgumentError(
                f"{where}: all {len(self)} images are of one class, {', '.join(there)}, and a "
                "model learns to tell classes apart: expected a folder of images for each class"
            )

    def subset(self, ids: Iterable[str]) -> Samples:
        """The samples with these ids, in that order.

        Raises:
            ArgumentError: there is no sample with one of the ids.
        """
        places = {sample: index for index, sample in enumerate(self.ids)}
        ids = list(ids)
        if missing := [sample for sample in ids if sample not in places]:
            raise ArgumentError(f"there is no sample {missing[0]!r} in the data")
        targets = [self.targets[places[sample]] for sample in ids]
        contents = self._contents and [self._contents[places[sample]] for sample in ids]
        return Samples(self._source, ids, targets, self.classes, self._transform, contents)

    def with_classes(self, classes: Sequence[str]) -> Samples:
        """The same samples, with their targets as indices into `classes`, those of a model.

        If the names of either are unknown, the targets stay.

        Raises:
            ArgumentError: a class of these samples is not among `classes`.
        """
        if not classes or not self.classes:
            return self
        if unknown := sorted(set(self.classes) - set(classes)):
            raise ArgumentError(
                f"class {unknown[0]!r} is not among the model's {len(classes)}: "
                f"{', '.join(list(classes)[:8])}{', ...' if len(classes) > 8 else ''}"
            )
        places = {name: index for index, name in enumerate(classes)}
        targets = [places[self.classes[target]] for target in self.targets]
        return Samples(self._source, self.ids, targets, classes, self._transform, self._contents)

    def _read(self, sample: str) -> bytes | Image.Image:
        try:
            return self._source.read(sample)
        except OSError as error:
            raise SampleError(f"sample {sample!r} cannot be read: {in_words(error)}") from error


class _Source(Protocol):
    def list(self) -> Listing: ...

    def read(self, sample: str) -> bytes | Image.Image:
        """A sample by its id."""
        ...


class _Folder:
    def __init__(self, root: Path, split: str, wanted: str = _WANTED) -> None:
        if not root.is_dir():
            raise ArgumentError(f"{root} is no folder: {wanted}")
        below = root / split
        self.root = below if safe(split) and below.is_dir() else root

    def list(self) -> Listing:
        return list_images(self.root)

    def read(self, sample: str) -> bytes:
        if not safe(sample):
            raise SampleError(f"sample {sample!r} is no path inside {self.root}: the plan is wrong")
        return (self.root / sample).read_bytes()


class _Indexed:
    """Hugging Face and torchvision data sets: a sample's id is its position."""

    def __init__(self, data: ImageData) -> None:
        self.data = data
        if data.name.startswith("torch/") and any(Path(data.root).glob("*/processed/*.pt")):
            raise ArgumentError(
                f"{data.root} holds files of an old torchvision, which are pickles: remove its "
                "'processed' folder, and keep 'raw'"
            )
        try:
            self.found = _found(data)
        except Exception as error:  # whatever these packages raise
            raise ArgumentError(
                f"{data.name} in {data.root} cannot be opened: {in_words(error)}"
            ) from error

    def list(self) -> Listing:
        reader = getattr(self.found, "reader", None)
        if reader is not None:
            targets = [int(target) for target in reader.iter_targets()]
            classes = reader.class_to_idx or {}
        else:
            listed = getattr(self.found, "targets", None)
            targets = [int(t) for t in (listed if listed is not None else self._all_targets())]
            classes = getattr(self.found, "class_to_idx", None) or {}
        ids = [str(index) for index in range(len(targets))]
        return Listing(ids, targets, sorted(classes, key=lambda name: classes[name]))

    def read(self, sample: str) -> bytes | Image.Image:
        if not sample.isdecimal() or int(sample) >= len(self.found):
            raise SampleError(f"{self.data.name} has no sample {sample!r}: the plan is wrong")
        reader = getattr(self.found, "reader", None)
        if reader is None:
            return self.found[int(sample)][0]
        with reader[int(sample)][0] as file:
            return file.read()

    def _all_targets(self) -> Iterable[int]:
        return (self.found[index][1] for index in range(len(self.found)))


class _Stream:
    """webdataset, read from its start and kept decoded in memory: a sample's id is its position."""

    def __init__(self, data: ImageData) -> None:
        self.data = data
        self._images: dict[str, tuple[Image.Image, int]] = {}

    def list(self) -> Listing:
        try:
            found = _found(self.data)
            samples = [(to_rgb(image), int(target)) for image, target in found.reader]
        except Exception as error:  # whatever these packages raise
            name, root = self.data.name, self.data.root
            raise ArgumentError(f"{name} in {root} cannot be read: {in_words(error)}") from error
        if missing := found.reader.num_samples - len(samples):  # timm skips them without an error
            raise ArgumentError(
                f"{missing} samples of {self.data.name} in {self.data.root} cannot be read, or are "
                "missing: repair the archives, or the number of samples in _info.json"
            )
        self._images = {str(index): sample for index, sample in enumerate(samples)}
        return Listing(list(self._images), [target for _, target in samples])

    def read(self, sample: str) -> Image.Image:
        if not self._images:
            self.list()
        if sample not in self._images:
            raise SampleError(f"{self.data.name} has no sample {sample!r}: the plan is wrong")
        return self._images[sample][0]


def _found(data: ImageData) -> Any:
    from timm.data.dataset_factory import create_dataset

    return create_dataset(data.name, data.root, data.split, input_img_mode="")  # not converted


def safe(path: str) -> bool:
    """Whether a path of a plan stays in its folder: it is relative and has no ".."."""
    parts = path.replace("\\", "/").split("/")
    return bool(path) and "\0" not in path and not {"", ".", ".."} & set(parts)


def _transform(config: Mapping[str, Any] | None, augment: bool) -> Any:
    if config is None:
        return None
    from timm.data.transforms_factory import create_transform

    return create_transform(**config, is_training=augment)


def _digest(read: bytes | Image.Image) -> str:
    if isinstance(read, Image.Image):
        head = f"{read.mode} {read.size}\n".encode()
        return hashlib.sha256(head + read.tobytes()).hexdigest()
    return hashlib.sha256(read).hexdigest()
