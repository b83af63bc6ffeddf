"""Deltas and their files: format, meta, crash safety, and whose delta a file holds."""

import copy
import dataclasses
import hashlib
import os
import pickle
import stat
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from delta_files import META, assert_same, read_header, some_delta
from small_models import tiny_vit

import tangent_ops
from tangent_ops.delta import Delta, DeltaMeta, fingerprint, load_delta, save_delta
from tangent_ops.errors import ArgumentError, DeltaError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "shard.safetensors"


# What is in a file


def test_comes_back_bit_for_bit_with_its_meta(path):
    delta = some_delta()
    save_delta(delta, path)
    loaded = load_delta(path)
    assert_same(loaded, delta)
    assert loaded.meta == META


def test_optional_fields_come_back_as_none(path):
    meta = DeltaMeta("a" * 64, "tiny", "head")
    save_delta({"w": torch.ones(2)}, path, meta=meta)
    assert load_delta(path).meta == meta


def test_safetensors_reads_the_file(path):
    delta = some_delta()
    save_delta(delta, path)
    assert_same(safetensors.torch.load_file(path), delta)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "tangent-ops delta"
    assert metadata["format_version"] == "1"
    assert metadata["anchor"] == META.anchor
    assert metadata["shard"] == "3"
    assert metadata["extra.labels"] == "füchse"


def test_tensors_are_aligned_in_the_file(path):
    save_delta(some_delta(), path)
    header, start = read_header(path)
    assert start % 8 == 0
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    for name in header.keys() - {"__metadata__"}:
        assert header[name]["data_offsets"][0] % sizes[header[name]["dtype"]] == 0


def test_the_same_content_gives_the_same_bytes(tmp_path):
    delta = some_delta()
    other = Delta({name: delta[name].clone() for name in reversed(delta)}, META)
    save_delta(delta, tmp_path / "one")
    save_delta(other, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_content_hash_is_the_documented_one(path):
    weight = np.arange(6, dtype="<f4").reshape(2, 3)
    tensors = {"b": torch.tensor(2.0, dtype=torch.float64), "a": torch.from_numpy(weight)}
    save_delta(tensors, path, meta=DeltaMeta("f" * 64, "m", "all"))
    line = (
        '{"metadata":{"anchor":"' + "f" * 64 + '","format":"tangent-ops delta",'
        '"format_version":"1","model":"m","trainable":"all"},'
        '"tensors":[["a","float32",[2,3]],["b","float64",[]]]}\n'
    )
    content = line.encode() + weight.tobytes() + struct.pack("<d", 2.0)
    header, _ = read_header(path)
    assert header["__metadata__"]["content_sha256"] == hashlib.sha256(content).hexdigest()


def test_strides_and_gradients_do_not_matter(path):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    save_delta({"w": weight.t()}, path, meta=META)
    loaded = load_delta(path)["w"]
    assert torch.equal(loaded, weight.detach().t())
    assert not loaded.requires_grad


def test_loaded_tensors_do_not_depend_on_the_file(path):
    delta = some_delta()
    save_delta(delta, path)
    loaded = load_delta(path)
    path.write_bytes(b"\0" * path.stat().st_size)  # in place: a mapped file would show it
    assert_same(loaded, delta)
    loaded["head.weight"].fill_(7)
    assert (loaded["head.weight"] == 7).all()


# Meta


def test_saving_takes_the_meta_it_is_given(path):
    save_delta(some_delta(), path, meta=dataclasses.replace(META, shard="4"))
    meta = load_delta(path).meta
    assert meta is not None and meta.shard == "4"


def test_a_plain_dict_needs_a_meta(path):
    with pytest.raises(ArgumentError, match="meta=DeltaMeta"):
        save_delta({"w": torch.ones(2)}, path)
    assert not path.exists()


@pytest.mark.parametrize(
    "fields", [{"shard": 3}, {"anchor": None}, {"extra": {"n": 1}}, {"extra": {1: "n"}}]
)
def test_meta_holds_strings_only(fields):
    with pytest.raises(ArgumentError, match=rf"{next(iter(fields))}.* must be a string"):
        dataclasses.replace(META, **fields)


def test_a_delta_is_a_dict_that_copies_and_pickles_with_its_meta():
    delta = some_delta()
    for same in (copy.deepcopy(delta), pickle.loads(pickle.dumps(delta))):
        assert isinstance(same, Delta) and same.meta == META
        assert_same(same, delta)


# Crash safety


@pytest.fixture
def old(path):
    """A file that a failing write must leave as it is, and alone in its folder."""
    save_delta(some_delta(), path)
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_file_and_no_other(call, old, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        save_delta({"w": torch.zeros(3)}, old, meta=META)


def test_an_interrupt_in_the_middle_leaves_the_old_file_and_no_other(old, monkeypatch):
    written = []

    def bytes_of(tensor):
        if written:
            raise KeyboardInterrupt
        written.append(tensor)
        return b"\0" * tensor.nbytes

    monkeypatch.setattr("tangent_ops.delta.content_sha256", lambda *args: "0" * 64)
    monkeypatch.setattr("tangent_ops.files.bytes_of", bytes_of)
    with pytest.raises(KeyboardInterrupt):
        save_delta({"v": torch.zeros(3), "w": torch.zeros(3)}, old, meta=META)
    assert written


def test_file_and_folder_are_synced_around_the_rename(path, monkeypatch):
    events = []
    replace, fsync = os.replace, os.fsync

    def spy_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("sync folder" if is_folder else "sync file")
        fsync(descriptor)

    def spy_replace(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    save_delta(some_delta(), path)
    assert events == ["sync file", "rename", "sync folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_keeps_the_old_file(old):
    old.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            save_delta({"w": torch.zeros(3)}, old, meta=META)
    finally:
        old.parent.chmod(0o700)


def test_a_link_stays_a_link(tmp_path, path):
    save_delta(some_delta(), path)
    (tmp_path / "latest").symlink_to(path)
    save_delta({"w": torch.zeros(3)}, tmp_path / "latest", meta=META)
    assert (tmp_path / "latest").is_symlink()
    assert load_delta(path).keys() == {"w"}


def test_the_file_has_the_usual_permissions(path):
    (path.parent / "ordinary").touch()
    save_delta(some_delta(), path)
    assert path.stat().st_mode == (path.parent / "ordinary").stat().st_mode


# Whose delta it is


def test_another_anchor_is_refused_with_both_named(path):
    save_delta(some_delta(), path)
    load_delta(path, anchor="a" * 64)
    message = r"another anchor: a{12} \(tiny\), expected b{12} \(as given\)"
    with pytest.raises(DeltaError, match=message):
        load_delta(path, anchor="b" * 64)


def test_a_tangent_model_takes_deltas_of_its_own_anchor_names_and_shapes(path):
    tangent = tangent_ops.linearize(tiny_vit(), "head")
    delta = tangent.delta_dict()
    save_delta(delta, path)
    loaded = load_delta(path, anchor=tangent.fingerprint)
    assert_same(loaded, delta)
    tangent.load_delta_dict(loaded)

    other = tangent_ops.linearize(tiny_vit(seed=1), "head")
    ours, theirs = tangent.fingerprint[:12], other.fingerprint[:12]
    with pytest.raises(
        DeltaError,
        match=rf"{ours} \(VisionTransformer\), expected {theirs} \(VisionTransformer\)",
    ):
        other.load_delta_dict(loaded)

    with pytest.raises(DeltaError, match=r"missing blocks\.0.* and 9 more"):
        tangent_ops.linearize(tiny_vit(), r"head|blocks\.0").load_delta_dict(loaded)
    with pytest.raises(DeltaError, match=r"unexpected head\.bias$"):
        tangent_ops.linearize(tiny_vit(), "head.weight").load_delta_dict(loaded)

    loaded["head.bias"] = torch.zeros(6)
    with pytest.raises(DeltaError, match=r"head.bias has shape \(6,\), expected \(5,\)"):
        tangent.load_delta_dict(loaded)


def test_an_anchor_of_another_kind_is_refused(path):
    with pytest.raises(ArgumentError, match=r"got a VisionTransformer: .*\.fingerprint"):
        load_delta(path, anchor=tiny_vit())  # pyright: ignore[reportArgumentType]


def test_fingerprint_sees_names_shapes_dtypes_and_bits():
    state = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
    same = fingerprint(state)
    assert len(same) == 64
    assert same == fingerprint(dict(reversed(state.items())))
    assert same == fingerprint(state | {"w": state["w"].t().contiguous().t()})
    assert same == fingerprint(state | {"w": torch.nn.Parameter(state["w"])})
    negative = state["w"].clone()
    negative[0, 0] = -0.0
    for changed in (
        {"v": state["w"], "n": state["n"]},
        {"w": state["w"]},
        state | {"w": state["w"].reshape(3, 2)},
        state | {"w": state["w"].view(torch.int32)},
        state | {"n": torch.tensor(3, dtype=torch.int32)},
        state | {"w": negative},
    ):
        assert fingerprint(changed) != same


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.complex64]
)
def test_fingerprint_takes_any_dtype_and_0_d(dtype):
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    assert fingerprint({"x": zero}) != fingerprint({"x": one})
    fingerprint({"x": torch.empty(0, 2, dtype=dtype)})
