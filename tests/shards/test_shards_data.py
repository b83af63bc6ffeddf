"""Images by their ids: none is executed, skipped or taken for another."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data.dataset_factory
import torch
from PIL import Image
from refusals import refused
from shard_runs import image_folder
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from tangent_ops.errors import ArgumentError, SampleError
from tangent_ops.shards import ImageData, by_class, by_column, by_hash
from tangent_ops.shards.data import safe
from tangent_ops.shards.decode import decoded

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
    refused(ArgumentError, "1 samples have no value", by_column, ids, {"a": "x", "b": "y"})


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_images_are_what_timm_makes_of_them(tmp_path: Path, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    path = tmp_path / "images" / "cat" / ("x.jpg" if mode == "CMYK" else "x.png")
    path.parent.mkdir(parents=True)
    image.save(path)
    found, target = ImageData(str(tmp_path / "images")).open(CONFIG)[0]
    expected = create_transform(**CONFIG)(Image.open(path).convert("RGB"))
    assert torch.equal(found, expected)  # pyright: ignore[reportArgumentType]
    assert target == 0


def class_folder(root: Path, *names: str) -> Path:
    """Small images that differ by their names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9, 99, 199)).save(root / name)
    return root


def tiff(bits: int, photometric: int, order: str, pixels: bytes, sample_format: int = 1) -> bytes:
    """A grey TIFF of two by two pixels, built by hand: PIL writes no such files."""
    short, long = "HHIHH", "HHII"  # a tag's number, type, count and value, as struct writes them
    tags = [
        *((short, tag, 3, 1, 2, 0) for tag in (256, 257)),  # width, height
        (short, 258, 3, 1, bits, 0),
        (short, 259, 3, 1, 1, 0),  # no compression
        (short, 262, 3, 1, photometric, 0),
        (long, 273, 4, 1, 8),  # where the pixels begin
        (long, 279, 4, 1, len(pixels)),
        (short, 339, 3, 1, sample_format, 0),
    ]
    entries = b"".join(struct.pack(order + form, *values) for form, *values in tags)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8 + len(pixels))
    return head + pixels + struct.pack(order + "H", len(tags)) + entries + b"\0" * 4


GREY = np.array([[0, 300], [40000, 65535]])


@pytest.mark.parametrize("kind", ["png", "tif", "big-endian tif", "an image"])
def test_16_bits_are_scaled_to_8(tmp_path: Path, kind: str) -> None:
    image = Image.fromarray(GREY.astype(np.uint16))
    assert image.mode == "I;16"
    if kind == "an image":  # of torchvision, say
        found = decoded(image, "x")
    else:
        path = tmp_path / f"x.{kind.split()[-1]}"
        image.save(path)
        if kind == "big-endian tif":
            path.write_bytes(tiff(16, 1, ">", GREY.astype(">u2").tobytes()))
        found = decoded(path.read_bytes(), "x")
    expected = np.array([[0, 1], [156, 255]])  # 300 / 65535 * 255 = 1.17; 40000: 155.6
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), expected[..., None].repeat(3, 2))


def test_every_number_of_16_bits_is_scaled_to_the_nearest() -> None:
    values = np.arange(65536).reshape(256, 256)
    found = np.asarray(decoded(Image.fromarray(values.astype(np.uint16)), "x"))[..., 0]
    np.testing.assert_array_equal(found, np.round(values / 65535 * 255))


ODD_DEPTHS = {
    "mode I": lambda path: Image.fromarray(GREY.astype(np.int32)).save(path, "TIFF"),
    "mode F": lambda path: Image.fromarray(np.ones((2, 2), np.float32)).save(path, "TIFF"),
    "mode I, ": lambda path: Image.fromarray(GREY.astype(np.uint16)).save(path, "PPM"),
    "of (12,) bits": lambda path: path.write_bytes(tiff(12, 1, "<", bytes(range(6)))),
    "photometric 0": lambda path: path.write_bytes(tiff(16, 0, "<", bytes(range(8)))),
    "mode I, integers": lambda path: path.write_bytes(tiff(16, 1, "<", bytes(8), 2)),
}


@pytest.mark.parametrize("said", ODD_DEPTHS)
def test_numbers_of_an_unknown_range_are_refused(tmp_path: Path, said: str) -> None:
    ODD_DEPTHS[said](tmp_path / "x.tif")
    refused(SampleError, re.escape(said), decoded, (tmp_path / "x.tif").read_bytes(), "x")


@pytest.mark.parametrize("name", ["x.WEBP", "x.gif", "x.tif", "x.tiff", "x.bmp", "x.ppm", "x.jpe"])
def test_every_format_is_found_and_read(tmp_path: Path, name: str) -> None:
    root = class_folder(tmp_path / "images", "cat/a.png", f"dog/{name}")
    samples = ImageData(str(root)).open(CONFIG)
    assert (samples.ids, samples.targets) == (["cat/a.png", f"dog/{name}"], [0, 1])
    with Image.open(root / "dog" / name) as image:
        expected = create_transform(**CONFIG)(image.convert("RGB"))
    assert torch.equal(samples[1][0], expected)  # pyright: ignore[reportArgumentType]


WRONG_FOLDERS = {
    "flat/1.png is in no class's folder": ("flat/1.png", "flat/2.png"),
    "mixed/1.png is in no class's folder": ("mixed/cat/1.png", "mixed/1.png"),
    "two folders of a class 'cat'": ("years/2025/cat/1.png", "years/2026/cat/1.png"),
    "dog/1.heic is in no format that is read": ("heic/cat/1.png", "heic/dog/1.heic"),
    "cat/2.AVIF is in no format that is read": ("avif/cat/1.png", "avif/cat/2.AVIF"),
    "dog holds no image": ("empty/cat/1.png", "empty/dog/"),
    "b/fish holds no image": ("deep/a/cat/1.png", "deep/b/dog/1.png", "deep/b/fish/"),
    "bird holds no image": ("hidden/cat/1.png", "hidden/bird/.cache/"),
    "bare holds no images": ("bare/",),
}


@pytest.mark.parametrize("said", WRONG_FOLDERS)
def test_no_image_and_no_class_is_passed_over(tmp_path: Path, said: str) -> None:
    for name in WRONG_FOLDERS[said]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_bytes(b"")
    root = tmp_path / WRONG_FOLDERS[said][0].split("/")[0]
    refused(ArgumentError, re.escape(said), ImageData(str(root)).open)


def test_what_else_is_in_a_folder(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "images", "10/1.png", "9/1.png", "9/10.png", "9/2.png")
    for name in ("notes.txt", "9/boxes.csv", ".DS_Store"):
        (root / name).write_text("")
    (root / ".cache" / "empty").mkdir(parents=True)
    samples = ImageData(str(root)).open()
    assert samples.passed_over == ["9/boxes.csv", "notes.txt"]
    assert samples.ids == ["9/1.png", "9/2.png", "9/10.png", "10/1.png"]
    assert samples.counts() == {"9": 3, "10": 1}


def test_classes_that_differ_by_case_alone_keep_their_order(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "images", "cat/1.png", "CAT/1.png", "Cat/1.png")
    assert ImageData(str(root)).open().classes == ["CAT", "Cat", "cat"]


def test_images_of_one_class_are_no_data_to_learn_from(tmp_path: Path) -> None:
    root = class_folder(tmp_path / "images", "cat/1.png", "cat/2.png")
    with pytest.raises(ArgumentError, match="here: all 2 images are of one class, cat"):
        ImageData(str(root)).open().check_classes("here")
    class_folder(root, "dog/1.png")
    samples = ImageData(str(root)).open()
    samples.check_classes("here")
    with pytest.raises(ArgumentError, match="one class, cat"):  # of two that it could have
        samples.subset(["cat/1.png", "cat/2.png"]).check_classes("here")


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
    """timm's own data set would replace it by the next image, maybe of another shard."""
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
        refused(ArgumentError, "unpickling", ImageData, str(tmp_path), name)
    for name in ("tfds/mnist", "http://x", "torch/", "hfids/x"):
        refused(ArgumentError, "expected nothing for a folder", ImageData, str(tmp_path), name)
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
    """A webdataset archive of five images, and timm's description of it."""
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


def test_a_stream_s_16_bits_are_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's reader would clip 16 bits to white before our code sees them."""
    grey = Image.fromarray(GREY.astype(np.uint16))

    class Reader(list):
        num_samples = 2

    class Found:
        def __init__(self, mode: str) -> None:
            self.reader = Reader([(grey.convert(mode) if mode else grey, k) for k in range(2)])

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(
        timm.data.dataset_factory,
        "create_dataset",
        lambda name, root, split, input_img_mode="RGB": Found(input_img_mode),
    )
    config = {**CONFIG, "input_size": (3, 2, 2), "crop_pct": 1.0}
    image = ImageData(str(tmp_path), "wds/x").open(config)[1][0]
    red = (image[0] * CONFIG["std"][0] + CONFIG["mean"][0]) * 255
    torch.testing.assert_close(red, torch.tensor([[0.0, 1], [156, 255]]), rtol=0, atol=1e-3)


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
    names = ["class3", "x", "class1", "class0", "class2"]
    assert samples.with_classes(names).targets == [3, 2, 4, 0]
    assert samples.with_classes(()).targets == [0, 1, 2, 3]
    refused(ArgumentError, "class3", samples.with_classes, ["class0", "class1", "class2"])
