"""What comes out of other people's packages: archives, pickles, IDX files, duplicates."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import studies  # noqa: F401  # makes the demo's modules importable

from assets import DemoError  # isort: skip
from studies.paper.data.archives import Package, debian, fetch_package, members, npm
from studies.paper.data.grey import read_idx
from studies.paper.data.pickles import load_array
from studies.paper.data.pool import Pool
from studies.paper.data.silhouettes import distinct


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


def test_a_package_is_fetched_once_and_checked(tmp_path: Path) -> None:
    registry, cache = tmp_path / "registry", tmp_path / "cache"
    contents = _tar({"package/a": b"1"}, "w:gz")
    (registry / "thing" / "-").mkdir(parents=True)
    served = registry / "thing" / "-" / "thing-1.0.tgz"
    served.write_bytes(contents)
    digest = hashlib.sha256(contents).hexdigest()
    package = Package("thing@1.0", "thing/-/thing-1.0.tgz", digest, registry.as_uri(), "NOT_SET")
    path = fetch_package(package, cache)
    assert path.read_bytes() == contents
    served.unlink()
    assert fetch_package(package, cache) == path  # no registry any more

    path.write_bytes(contents[:-1])  # damaged: never used
    with pytest.raises(DemoError, match=r"could not fetch thing@1\.0"):
        fetch_package(package, cache)
    served.write_bytes(b"something else")
    with pytest.raises(DemoError, match="expected"):
        fetch_package(package, cache)
    assert not [file for file in cache.rglob("*") if file.name == "part"]


def test_a_mirror_is_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", "https://mirror.example/npm/")
    assert npm("a", "1.0", "").address == "https://mirror.example/npm/a/-/a-1.0.tgz"
    monkeypatch.delenv("npm_config_registry")
    assert npm("a", "1.0", "").address == "https://registry.npmjs.org/a/-/a-1.0.tgz"
    monkeypatch.setenv("TANGENT_OPS_DEBIAN_MIRROR", "http://mirror.example")
    assert debian("a", "pool/a.deb", "").address == "http://mirror.example/pool/a.deb"


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
