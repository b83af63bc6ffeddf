"""Images by their ids: nothing is executed, nothing is skipped, nothing is taken for another."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from shard_runs import image_folder
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from tangent_ops.errors import ArgumentError, SampleError
from tangent_ops.shards import ImageData, by_class, by_column, by_hash
from tangent_ops.shards.data import safe

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def test_by_hash_is_stable_and_proportional() -> None:
    ids = [f"images/{k}.png" for k in range(3000)]
    whole = by_hash(ids, 3, proportions=[5, 1, 2])
    assert sorted(id for part in whole.values() for id in part) == sorted(ids)
    some = by_hash(ids[::7], 3, proportions=[5, 1, 2])
    assert all(set(some[name]) <= set(whole[name]) for name in whole)
    sizes = np.array([len(part) for part in whole.values()])
    expected = 3000 * np.array([5, 1, 2]) / 8
    assert ((sizes - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees: p = 0.001
    assert list(by_hash(ids, 11)) == [f"shard-{k:02}" for k in range(11)]
    for shards, proportions in ((0, None), (2, [1]), (2, [1, 0]), (2, [1, float("nan")])):
        with pytest.raises(ArgumentError):
            by_hash(ids, shards, proportions=proportions)


def test_by_class_and_by_column() -> None:
    ids = ["a", "b", "c"]
    assert by_class(ids, [1, 0, 1], ["cat", "dog"]) == {"cat": ["b"], "dog": ["a", "c"]}
    assert by_column(ids, {"a": "x", "b": "y", "c": "x", "d": "z"}) == {"x": ["a", "c"], "y": ["b"]}
    with pytest.raises(ArgumentError, match="1 samples have no value"):
        by_column(ids, {"a": "x", "b": "y"})


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_images_are_what_timm_makes_of_them(tmp_path: Path, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200) if mode == "I;16" else (
        image.convert(mode)
    )  # fmt: skip
    path = tmp_path / "images" / "cat" / ("x.jpg" if mode == "CMYK" else "x.png")
    path.parent.mkdir(parents=True)
    image.save(path)
    found, target = ImageData(str(tmp_path / "images")).open(CONFIG)[0]
    expected = create_transform(**CONFIG)(Image.open(path).convert("RGB"))
    assert torch.equal(found, expected)  # pyright: ignore[reportArgumentType]
    assert target == 0


def test_a_model_s_own_configuration(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", each=1)
    config = resolve_model_data_config(timm.create_model("test_vit"))
    image, _ = ImageData(str(root)).open(config)[0]
    assert image.shape == (3, 160, 160)


BAD = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "pickle": lambda path: path.write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00."),
    "PostScript": lambda path: path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    ),
    "another format": lambda path: Image.new("RGB", (32, 32)).save(path, "PCX"),
    "empty": lambda path: path.write_bytes(b""),
    "a bomb": lambda path: Image.new("1", (12000, 12000)).save(path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_image_is_named_and_never_replaced(tmp_path: Path, how: str) -> None:
    """timm's own data set goes on to the next image: another shard's, say."""
    root = image_folder(tmp_path / "images", each=2)
    samples = ImageData(str(root)).open(CONFIG)
    index = samples.ids.index("class1/0.png")
    BAD[how](root / "class1" / "0.png")
    with pytest.raises(SampleError, match=r"class1/0\.png"):
        samples[index]
    assert samples[index + 1][1] == 1


def test_a_changed_image_is_not_trained_on(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", each=2)
    samples = ImageData(str(root)).open(CONFIG)
    contents = [samples.content(index) for index in range(len(samples))]
    options = (samples.ids, samples.targets, contents, CONFIG)
    picked = ImageData(str(root)).pick(*options)
    assert torch.equal(picked[3][0], samples[3][0])
    other = root / samples.ids[4]
    (root / samples.ids[3]).write_bytes(other.read_bytes())
    with pytest.raises(SampleError, match="not what it was"):
        picked[3]


def test_paths_stay_in_their_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", each=1)
    Image.new("RGB", (32, 32)).save(tmp_path / "secret.png")
    for path in ("../secret.png", str(tmp_path / "secret.png"), "class0/../../secret.png",
                 "class0//0.png", "./class0/0.png", "..\\secret.png", "a\0b", ""):  # fmt: skip
        assert not safe(path)
        picked = ImageData(str(root)).pick([path], [0], ["0" * 64], CONFIG)
        with pytest.raises(SampleError, match="no path inside"):
            picked[0]
    assert safe("class0/0.png") and safe("..a/b..") and safe("ü/x y.png")


def test_sources_that_unpickle_are_refused(tmp_path: Path) -> None:
    for name in ("torch/cifar10", "torch/CIFAR100", "torch/imagenet", "torch/qmnist"):
        with pytest.raises(ArgumentError, match="unpickling"):
            ImageData(str(tmp_path), name)
    for name in ("tfds/mnist", "http://x", "torch/", "hfids/x"):
        with pytest.raises(ArgumentError, match="expected nothing for a folder"):
            ImageData(str(tmp_path), name)
    (tmp_path / "images.tar").write_bytes(b"")
    with pytest.raises(ArgumentError, match="is no folder"):  # timm keeps a pickle beside a tar
        ImageData(str(tmp_path / "images.tar")).open()
    (tmp_path / "FashionMNIST" / "processed").mkdir(parents=True)
    (tmp_path / "FashionMNIST" / "processed" / "training.pt").write_bytes(b"")
    with pytest.raises(ArgumentError, match="old torchvision"):
        ImageData(str(tmp_path), "torch/fashion_mnist").open()


def test_torchvision(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 28, 28)).astype(np.uint8)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        images = struct.pack(">IIII", 0x803, 6, 28, 28) + pixels.tobytes()
        labels = struct.pack(">II", 0x801, 6) + bytes(range(6))
        for name, content in (("images-idx3", images), ("labels-idx1", labels)):
            (raw / f"{split}-{name}-ubyte").write_bytes(content)
            (raw / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    samples = ImageData(str(tmp_path), "torch/fashion_mnist").open(CONFIG)
    assert samples.ids == [str(k) for k in range(6)]
    assert samples.targets == list(range(6))
    assert samples.classes[2] == "Pullover"
    expected = create_transform(**CONFIG)(Image.fromarray(pixels[2]).convert("RGB"))
    assert torch.equal(samples[2][0], expected)  # pyright: ignore[reportArgumentType]
    assert len({samples.content(k) for k in range(6)}) == 6
    assert samples.subset(["4", "1"]).targets == [4, 1]
    picked = ImageData(str(tmp_path), "torch/fashion_mnist").pick(["9"], [0], ["0"], CONFIG)
    with pytest.raises(SampleError, match="no sample '9'"):
        picked[0]


def archive(root: Path, broken: bool) -> None:
    """webdataset: an archive of five images, and timm's description of it."""
    root.mkdir()
    with tarfile.open(root / "train.tar", "w") as tar:
        for index in range(5):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (index * 40,) * 3).save(buffer, "PNG")
            image = b"none" if broken and index == 2 else buffer.getvalue()
            for end, content in (("png", image), ("cls", str(index % 2).encode())):
                entry = tarfile.TarInfo(f"{index:04}.{end}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    split = {"name": "train", "filenames": ["train.tar"], "shard_lengths": [5], "num_samples": 5}
    (root / "_info.json").write_text(json.dumps({"splits": {"train": split}}))


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_webdataset(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="not a dependency")
    archive(tmp_path / "good", broken=False)
    samples = ImageData(str(tmp_path / "good"), "wds/x").open(CONFIG)
    assert (samples.ids, samples.targets) == (list("01234"), [0, 1, 0, 1, 0])
    expected = create_transform(**CONFIG)(Image.new("RGB", (32, 32), (120,) * 3))
    assert torch.equal(samples[3][0], expected)  # pyright: ignore[reportArgumentType]
    archive(tmp_path / "bad", broken=True)
    with pytest.raises(ArgumentError, match="1 samples of wds/x"):
        ImageData(str(tmp_path / "bad"), "wds/x").open(CONFIG)


def test_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("datasets", reason="not a dependency")
    root = image_folder(tmp_path / "images" / "train", classes=2, each=2)
    samples = ImageData(str(tmp_path / "cache"), f"hfds/{root.parent}").open(CONFIG)
    assert (samples.ids, samples.targets) == (list("0123"), [0, 0, 1, 1])
    assert samples.classes == ["class0", "class1"]
    expected = create_transform(**CONFIG)(Image.open(root / "class1" / "0.png"))
    assert torch.equal(samples[2][0], expected)  # pyright: ignore[reportArgumentType]


def test_classes_of_a_model(tmp_path: Path) -> None:
    samples = ImageData(str(image_folder(tmp_path / "images", each=1))).open()
    assert samples.with_classes(["class3", "x", "class1", "class0", "class2"]).targets == [
        3,
        2,
        4,
        0,
    ]
    assert samples.with_classes(()).targets == [0, 1, 2, 3]
    with pytest.raises(ArgumentError, match="class3"):
        samples.with_classes(["class0", "class1", "class2"])
