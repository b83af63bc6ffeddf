"""Files that are written atomically: what a full disk and killed processes leave."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tangent_ops.errors import DiskFullError, in_words
from tangent_ops.files import sweep, write_atomically, write_new, write_safetensors

STALE = ".0123456789abcdef.tmp"
WRITER = """
import sys, time
from pathlib import Path
from tangent_ops.files import write_atomically

def slowly(file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)

write_atomically(Path(sys.argv[1]), slowly)
"""


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("write", [write_atomically, write_new])
def test_a_full_disk_is_told_with_path_and_bytes(tmp_path: Path, write, monkeypatch) -> None:
    tensors = {"x": torch.zeros(1000)}
    write_atomically(tmp_path / "there", lambda file: write_safetensors(file, tensors, {}))
    size = (tmp_path / "there").stat().st_size
    path = tmp_path / "delta.safetensors"
    full_disk(monkeypatch)
    with pytest.raises(DiskFullError) as caught:
        write(path, lambda file: write_safetensors(file, tensors, {}))
    assert f"the disk is full: {path} needs {size:,} bytes, and " in str(caught.value)
    assert "make room, and give the same command again" in str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert "Errno" not in in_words(caught.value)


def test_a_full_disk_leaves_the_older_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    full_disk(monkeypatch)
    with pytest.raises(DiskFullError):
        write_atomically(path, lambda file: file.write(b"new") and None)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_bytes() == b"old"


def test_other_errors_pass_on(tmp_path: Path) -> None:
    def fail(_) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output") as caught:
        write_atomically(tmp_path / "x", fail)
    assert not isinstance(caught.value, DiskFullError)


def test_temporary_files_of_dead_processes_are_swept_and_no_others(tmp_path: Path) -> None:
    kept = ["notes.tmp", ".0123.tmp", "0123456789abcdef.tmp", ".0123456789ABCDEF.tmp"]
    for name in (STALE, *kept):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".00000000000000aa.tmp").mkdir()
    (tmp_path / ".00000000000000bb.tmp").symlink_to(tmp_path / "notes.tmp")
    write_atomically(tmp_path / "x", lambda file: file.write(b"new") and None)
    links = {".00000000000000aa.tmp", ".00000000000000bb.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == {"x", *kept, *links}


def test_the_file_of_a_living_process_stays_and_is_swept_once_it_is_killed(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == "writing\n"
        sweep(tmp_path)
        (left,) = tmp_path.iterdir()
        assert left.read_bytes() == b"half"
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    assert left.exists()
    for _ in range(50):  # the lock goes with the process
        sweep(tmp_path)
        if not left.exists():
            break
        time.sleep(0.1)
    assert not left.exists()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda path: open(path / "no"), "no: there is no such file or folder"),  # noqa: SIM115
        (lambda path: open(path), "it is a folder: give a file"),  # noqa: SIM115
        (lambda path: os.listdir(__file__), "a file, not a folder"),
        (lambda path: path.mkdir(), "it exists"),
        (lambda path: open(path / ("x" * 300)), "name is too long"),  # noqa: SIM115
    ],
)
def test_errors_of_the_system_in_words(tmp_path: Path, call, said: str) -> None:
    with pytest.raises(OSError) as caught:
        call(tmp_path)
    words = in_words(caught.value)
    assert said in words
    assert "Errno" not in words
