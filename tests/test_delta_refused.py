"""Files and tensors that are no delta, and damaged files: each is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct

import pytest
import safetensors.torch
import torch
from delta_files import META, assert_same, read_header, some_delta

from tangent_ops import compose
from tangent_ops.delta import Delta, load_delta, save_delta
from tangent_ops.errors import ArgumentError, DeltaError, DeltaFileError

TWO = struct.pack("<ff", 1, 2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "shard.safetensors"


def craft(path, data=TWO, *, code="F32", dtype="float32", shape=(2,), tensors=True, **metadata):
    """A file of one tensor, with the hash that the format's documentation defines."""
    kept = {"format": "tangent-ops delta", "format_version": "1"}
    kept |= {"anchor": "a", "model": "m", "trainable": "t", **metadata}
    listed = [["w", dtype, list(shape)]] if tensors else []
    line = json.dumps(
        {"metadata": kept, "tensors": listed}, sort_keys=True, separators=(",", ":")
    ).encode()
    kept["content_sha256"] = hashlib.sha256(line + b"\n" + data).hexdigest()
    entry = {"w": {"dtype": code, "shape": list(shape), "data_offsets": [0, len(data)]}}
    header = json.dumps({"__metadata__": kept, **(entry if tensors else {})}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_a_file_written_by_the_documentation_is_read(path):
    craft(path)
    assert torch.equal(load_delta(path)["w"], torch.tensor([1.0, 2.0]))
    craft(path, format_version="2", rank="3", basis="b")
    meta = load_delta(path).meta
    assert meta is not None and (meta.rank, meta.basis) == (3, "b")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"format_version": "2", "rank": "0", "basis": "b"}, "rank '0'"),
        ({"format_version": "2", "rank": "-3", "basis": "b"}, "rank '-3'"),
        ({"format_version": "2", "rank": "007", "basis": "b"}, "rank '007'"),
        ({"format_version": "2", "rank": "٣", "basis": "b"}, "rank"),
        ({"format_version": "2", "rank": "9" * 5000, "basis": "b"}, "rank '999"),
        ({"format_version": "2", "rank": "two", "basis": "b"}, "'two' in .*not a number from 1 up"),
        ({"format_version": "2", "rank": "3"}, "lacks basis"),
        ({"format_version": "2", "basis": "b"}, "lacks rank"),
        ({"rank": "3"}, "rank in its header, which format 1 does not"),
        ({"basis": "b"}, "basis in its header, which format 1 does not"),
        ({"rank": "3", "basis": "b"}, "basis, rank in its header"),
        ({"data": struct.pack("<ff", 1, float("nan"))}, "not finite in w"),
        ({"data": struct.pack("<ff", float("-inf"), 1)}, "not finite in w"),
        ({"data": b"", "tensors": False}, "no tensors"),
        ({"code": "I64", "dtype": "int64", "shape": (1,)}, "w is I64"),
        ({"code": "BOOL", "dtype": "bool", "shape": (8,)}, "w is BOOL"),
        ({"code": "F8_E4M3", "dtype": "float8_e4m3fn", "shape": (8,)}, "w is F8_E4M3"),
        ({"code": "C64", "dtype": "complex64", "shape": (1,)}, "w is C64"),
        ({"data": b"", "shape": (0, 2**62, 2**62)}, "holds no delta"),
        ({"data": b"", "shape": (0, 2**63)}, "holds no delta"),
        ({"shape": (2, *[1] * 5000)}, "holds no delta"),
    ],
)
def test_a_crafted_file_with_the_right_hash_is_refused(path, what, message):
    craft(path, **what)
    with pytest.raises(DeltaFileError, match=message):
        load_delta(path)


@pytest.mark.parametrize("made", ["pipe", "socket", "device"])
def test_what_is_no_file_is_refused_at_once(made, tmp_path):
    """A pipe would wait for a writer, a device has no end."""
    path = tmp_path / "delta"
    if made == "pipe":
        os.mkfifo(path)
    elif made == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    other_end = os.open(path, os.O_RDWR) if made == "pipe" else None  # or a fault here would hang
    with pytest.raises(OSError, match="delta"):
        load_delta(path)
    if other_end is not None:
        os.close(other_end)


def test_a_link_to_a_delta_is_the_users_choice(path, tmp_path):
    save_delta({"w": torch.ones(2)}, path, meta=META)
    (tmp_path / "latest").symlink_to(path)
    assert torch.equal(load_delta(tmp_path / "latest")["w"], torch.ones(2))


def test_a_folder_whose_name_is_no_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"d\xff")
    folder.mkdir()
    save_delta({"w": torch.ones(2)}, folder / "delta", meta=META)
    assert torch.equal(load_delta(folder / "delta")["w"], torch.ones(2))


@pytest.mark.parametrize("field", ["anchor", "model", "loss", "extra"])
def test_text_that_no_file_can_hold_is_refused(field):
    """Half a surrogate pair: such a file could be written but not read."""
    half = "a\ud800"
    with pytest.raises(ArgumentError, match=f"{field}.* must be text"):
        dataclasses.replace(META, **{field: {"key": half} if field == "extra" else half})


def test_names_that_no_file_can_hold_are_refused(path):
    with pytest.raises(DeltaError, match="no text"):
        save_delta({"\udfff": torch.ones(1)}, path, meta=META)
    save_delta({"füchse 狐 🦊": torch.ones(1)}, path, meta=META)
    assert load_delta(path).keys() == {"füchse 狐 🦊"}


# Tensors


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({}, "no tensors"),
        ({"w": torch.tensor([1.0, float("nan")])}, "not finite in w"),
        ({"w": torch.tensor([float("-inf")])}, "not finite in w"),
        ({"w": torch.arange(3)}, "w is torch.int64; supported are float64"),
        ({"w": [1.0]}, "'w' to a list"),
        ({1: torch.ones(1)}, "1 to a Tensor"),
        ({"__metadata__": torch.ones(1)}, "reserved"),
    ],
)
def test_refuses_to_save(delta, message, path):
    path.write_bytes(b"precious")
    with pytest.raises(DeltaError, match=message):
        save_delta(delta, path, meta=META)
    assert path.read_bytes() == b"precious"


def test_refuses_a_folder_and_a_missing_folder(tmp_path):
    with pytest.raises(ArgumentError, match="is a folder"):
        save_delta(some_delta(), tmp_path)
    with pytest.raises(ArgumentError, match="in a folder that does not exist"):
        save_delta(some_delta(), tmp_path / "missing" / "shard.safetensors")


WITHOUT_VALUES = {
    "sparse": (torch.eye(2).to_sparse(), "is sparse_coo"),
    "jagged": (
        torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
        "is nested",
    ),
    "meta": (torch.ones(2, device="meta"), "on the meta device"),
    "mkldnn": (torch.ones(2).to_mkldnn(), "is _mkldnn"),
}


@pytest.mark.parametrize(("value", "message"), WITHOUT_VALUES.values(), ids=WITHOUT_VALUES)
def test_tensors_without_plain_values_are_refused(value, message, path):
    with pytest.raises(DeltaError, match=message):
        save_delta({"w": value}, path, meta=META)
    with pytest.raises(DeltaError, match=message):
        compose([{"w": value}])
    assert not path.exists()


# Damaged files


def edit_header(path, edit):
    """Rewrite the header as a careful person with an editor would."""
    header, start = read_header(path)
    data = path.read_bytes()[start:]
    edit(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def test_editing_nothing_is_no_edit(path):
    save_delta(some_delta(), path)
    edit_header(path, lambda header: None)
    assert_same(load_delta(path), some_delta())


def test_a_file_cut_anywhere_is_refused(path):
    save_delta(Delta({"w": torch.randn(3), "b": torch.randn(1)}, META), path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DeltaFileError, match=path.name):
            load_delta(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(DeltaFileError):
        load_delta(path)


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_a_byte_flipped_anywhere_is_refused(path, mask):
    # An "ü" is escaped in hexadecimal, where c and C are the same content.
    meta = dataclasses.replace(META, extra={"labels": "foxes"})
    save_delta(Delta({"w": torch.randn(3), "b": torch.randn(1)}, meta), path)
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]
        )
        with pytest.raises(DeltaFileError):
            load_delta(path)


def metadata(**fields):
    return lambda header: header["__metadata__"].update(fields)


TEXTS = ["anchor", "model", "trainable", "loss", "shard", "extra.labels", "content_sha256"]
EDITS = {
    "name": lambda header: header.update(scala=header.pop("scale")),
    "shape": lambda header: header["head.weight"].update(shape=[4, 3]),
    "dtype": lambda header: header["gamma"].update(dtype="F16"),
    "swapped": lambda header: header.update(gamma=header["scale"], scale=header["gamma"]),
    "added": metadata(**{"extra.note": "trust me"}),
    **{field: metadata(**{field: "b" * 64}) for field in TEXTS},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_header_is_refused(path, edit):
    save_delta(some_delta(), path)
    edit_header(path, edit)
    with pytest.raises(DeltaFileError, match="changed after it was written"):
        load_delta(path)


@pytest.mark.parametrize("field", ["anchor", "model", "trainable", "content_sha256"])
def test_missing_metadata_is_refused(path, field):
    save_delta(some_delta(), path)
    edit_header(path, lambda header: header["__metadata__"].pop(field))
    with pytest.raises(DeltaFileError, match=f"lacks {field}"):
        load_delta(path)


def test_a_later_format_is_refused(path):
    save_delta(some_delta(), path)
    edit_header(path, metadata(format_version="4"))
    with pytest.raises(DeltaFileError, match=r"format version 4.*reads 1, 2, 3.*update"):
        load_delta(path)


def test_other_files_are_refused(path):
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    others = {
        "not a delta file": path.read_bytes(),
        "no safetensors file": b"dear diary",
        "shard": b"",
    }
    for message, content in others.items():
        path.write_bytes(content)
        with pytest.raises(DeltaFileError, match=message):
            load_delta(path)


def test_a_missing_file_is_missing(path):
    with pytest.raises(FileNotFoundError, match="shard"):
        load_delta(path)
    with pytest.raises(IsADirectoryError):
        load_delta(path.parent)
