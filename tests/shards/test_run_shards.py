"""A run gives the same bits with any executor, any number of workers, and workers killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from shard_runs import anchor_file, bits, create_plan, image_folder, make_plan, trained
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch.utils.data import TensorDataset

import tangent_ops
from tangent_ops.errors import ArgumentError, PlanError, UnsupportedError
from tangent_ops.shards import ImageData, Plan, find, job, run_shards

MOMENTS = ("before", "after")
SLOW = {"epochs": 30, "cache": False}  # long enough to be killed on the way


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, an anchor and a run whose shards were trained in this process."""
    folder = tmp_path_factory.mktemp("shards")
    trained(make_plan(folder, shards=4, run="reference", **SLOW))
    return folder


def test_a_delta_is_what_fit_gives(setting: Path) -> None:
    """The same shard without plan, worker or file: timm's model, PIL's images, `fit`."""
    plan = Plan.open(setting / "reference")
    shard = plan.shards()[0]
    data = plan.job(shard.name)
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    model.load_state_dict(load_file(setting / "anchor.safetensors"))
    config = resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    prepare = create_transform(**config)
    images = [prepare(Image.open(setting / "images" / s.id).convert("RGB")) for s in data.samples]
    targets = [int(s.id[len("class")]) for s in data.samples]
    tangent = tangent_ops.linearize(model.eval(), tangent_ops.last_blocks(model, 1))
    torch.set_num_threads(1)
    samples = TensorDataset(torch.stack(images), torch.tensor(targets))
    tangent_ops.fit(tangent, samples, epochs=30, lr=1e-3, batch_size=4, progress=False)
    found = tangent_ops.load_delta(plan.result_path(data.hash))
    assert found.keys() == tangent.deltas().keys()
    for name, expected in tangent.deltas().items():
        assert torch.equal(found[name], expected)
        assert expected.any() or "norm" in name
    assert found.meta is not None
    assert found.meta.shard == shard.name
    assert found.meta.extra["job"] == data.hash


@contextmanager
def killing(pattern: bytes, most: int, servers: bool = False) -> Iterator[list[int]]:
    """Kills processes that train a shard, at random times, while the block runs.

    Their command lines contain `pattern`. For the local executor they are the children that its
    servers forked, and the servers too if `servers` is set.
    """
    killed: list[int] = []
    done = threading.Event()
    draw = random.Random(0)

    def kill() -> None:
        while not done.wait(draw.uniform(0.02, 0.2)) and len(killed) < most:
            family = _family(os.getpid())
            at_work = [pid for pid in family if pattern in _command(pid)]
            forked = [pid for pid in at_work if family[pid] in at_work]
            if b"worker" in pattern:
                at_work = forked + ([family[pid] for pid in forked] if servers else [])
            if at_work:
                with suppress(ProcessLookupError):
                    victim = draw.choice(at_work)
                    os.kill(victim, signal.SIGKILL)
                    killed.append(victim)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


def _family(pid: int) -> dict[int, int]:
    """Every descendant of a process -> its parent."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            after_name = entry.read_text(errors="replace").rpartition(")")[2]
            parents[int(entry.parent.name)] = int(after_name.split()[1])
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return {child: parents[child] for child in below - {pid}}


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_local_workers_killed_at_random(setting: Path) -> None:
    plan = make_plan(setting, shards=4, run="killed", **SLOW)
    with killing(b"tangent_ops.shards.worker", most=3, servers=True) as killed:
        report = run_shards(plan, workers=2, retries=50, progress=False)
    assert len(killed) >= 2  # each costs the imports of a new worker
    assert set(report.trained) == {shard.name for shard in plan.shards()}
    assert not report.failed
    assert bits(plan) == bits(Plan.open(setting / "reference"))
    again = run_shards(plan, progress=False)
    assert (again.trained, set(again.skipped)) == ((), set(report.trained))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")
def test_ray_workers_killed_at_random(setting: Path) -> None:
    pytest.importorskip("ray", reason="the extra distributed is not installed")
    plan = make_plan(setting, shards=4, run="ray", **SLOW)
    with killing(b"ray::attempt", most=2) as killed:
        report = run_shards(plan, "ray", workers=2, retries=50, progress=False)
    assert len(killed) >= 2
    assert set(report.trained) == {shard.name for shard in plan.shards()}
    assert bits(plan) == bits(Plan.open(setting / "reference"))


DOOMED = """
import os, signal, sys
from tangent_ops.shards import job, worker  # imports once what both children need

real = os.replace

def fatal(source, target):
    if not str(target).endswith(".safetensors"):
        return real(source, target)
    if moment == "after":
        real(source, target)
    os.kill(os.getpid(), signal.SIGKILL)

for moment in ("before", "after"):
    child = os.fork()
    if child == 0:
        os.replace = fatal
        os._exit(len(job.attempt(sys.argv[1] + moment, "shard-1")))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_killed_at_the_renaming(setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No partial delta is left, and a complete one is not trained again."""
    reference = bits(trained(make_plan(setting, shards=4, run="renaming")))
    plans = {m: make_plan(setting, shards=4, run=f"renaming-{m}") for m in MOMENTS}
    ended = subprocess.run(
        [sys.executable, "-c", DOOMED, str(setting / "renaming-")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split() == [str(-signal.SIGKILL.value)] * 2
    for moment, plan in plans.items():
        shard = plan.shards()[1]
        assert shard.done == (moment == "after")
        with monkeypatch.context() as patch:
            if moment == "after":
                patch.setattr(job, "_train", lambda *_: pytest.fail("trained twice"))
            assert "error" not in job.attempt(str(plan.path), shard.name)
        name = plan.result_path(shard.job or "").name
        assert bits(plan)[name] == reference[name]


def test_one_bad_shard_keeps_no_other_from_its_end(tmp_path: Path) -> None:
    """Shards with a damaged image, one sample, none, and an image that was replaced."""
    images = image_folder(tmp_path / "images")
    anchor_file(tmp_path / "anchor.safetensors")
    (images / "class0" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"poison" * 100)
    ids = ImageData(str(images)).open().ids
    assignment = {
        "poisoned": ["class0/0.png", "class1/0.png"],
        "single": ["class2/0.png"],
        "empty": [],
        "good": ids[8:12],
        "changed": ["class3/5.png"],
    }
    plan = create_plan(tmp_path, assignment)
    shutil.copy(images / "class3" / "4.png", images / "class3" / "5.png")
    events = {}
    report = run_shards(plan, workers=1, progress=False, on_done=events.__setitem__)
    assert set(report.trained) == {"single", "good"}
    assert report.empty == ("empty",)
    assert report.failed.keys() == {"poisoned", "changed"}
    assert "class0/0.png" in report.failed["poisoned"]
    assert "not what it was" in report.failed["changed"]
    assert events.keys() == {"poisoned", "single", "good", "changed"}
    assert len(events["good"]["loss"]) == 1
    assert [shard.done for shard in plan.shards()] == [False, True, False, True, False]
    assert len(bits(plan)) == 2


def test_a_shard_that_kills_its_process_is_given_up(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, shards=2, **SLOW)
    with killing(b"tangent_ops.shards.worker", most=10**6):
        report = run_shards(plan, workers=1, retries=1, progress=False)
    assert report.failed
    for message in report.failed.values():
        assert "died 2 times" in message
    assert not [path for path in bits(plan) if not path.endswith("safetensors")]


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[Path]:
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {made.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_and_a_read_only_one(tmp_path: Path) -> None:
    """No partial file is left, and the same call goes on once there is room."""
    make_plan(tmp_path, run="elsewhere")
    with small_disk(tmp_path / "disk", 2600) as disk:
        shutil.copytree(tmp_path / "elsewhere", disk / "run")
        plan = Plan.open(disk / "run")
        filler = disk / "filler"
        used = shutil.disk_usage(disk)
        filler.write_bytes(bytes(used.free - 200_000))  # room for one delta
        report = run_shards(plan, workers=1, progress=False)
        assert len(report.trained) == 1
        assert len(report.failed) == 2
        assert all("the disk is full" in message for message in report.failed.values())
        assert len(bits(plan)) == 1
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            run_shards(plan, workers=1, progress=False)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        filler.unlink()
        trained(plan)
        assert all(shard.done for shard in plan.shards())


@pytest.mark.parametrize(("shards", "bar"), [(1, "fit:"), (2, "shards:")])
def test_one_shard_shows_its_own_progress(tmp_path: Path, capfd, shards: int, bar: str) -> None:
    plan = make_plan(tmp_path, shards=shards)
    report = run_shards(plan, workers=1)
    assert len(report.trained) == shards
    printed = capfd.readouterr()
    assert printed.out == ""
    assert {name for name in ("fit:", "shards:") if name in printed.err} == {bar}


def test_interrupted_it_stops_its_workers(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, shards=3, **SLOW)

    def interrupt(shard, found) -> None:
        raise KeyboardInterrupt  # as Python does at Ctrl-C

    with pytest.raises(KeyboardInterrupt):
        run_shards(plan, workers=2, progress=False, on_done=interrupt)
    assert not [pid for pid in _family(os.getpid()) if b"shards.worker" in _command(pid)]
    assert sum(shard.done for shard in plan.shards()) >= 1
    with plan.locked():
        pass


def test_refusals(tmp_path: Path, monkeypatch) -> None:
    plan = make_plan(tmp_path)
    for options, words in (
        ({"executor": "slurm"}, "executor"),
        ({"workers": 0}, "workers"),
        ({"retries": -1}, "retries"),
        ({"address": "ray://head:10001"}, "address"),
    ):
        with pytest.raises(ArgumentError, match=words):
            run_shards(plan, progress=False, **options)
    with plan.locked(), pytest.raises(PlanError, match="another process"):
        run_shards(Plan.open(plan.path), progress=False)
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "ray", None)
        with pytest.raises(UnsupportedError, match=r"tangent-ops\[distributed\]"):
            run_shards(plan, "ray", progress=False)
    with pytest.raises(ArgumentError, match="one of"):
        find(plan, shard="shard-0", label="x")


def test_other_images_in_two_shards(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    anchor_file(tmp_path / "anchor.safetensors")
    shutil.copy(images / "class0" / "0.png", images / "class0" / "copy.png")
    shards = {"a": ["class0/0.png", "class1/0.png"], "b": ["class0/copy.png"]}
    with pytest.raises(ArgumentError, match=r"copy\.png.*same content.*0\.png.*allow overlap"):
        create_plan(tmp_path, shards)
    assert not (tmp_path / "run").exists()
    plan = create_plan(tmp_path, shards, allow_overlap=True)
    assert plan.overlap and Plan.open(plan.path).overlap
    assert plan.find(sample="class0/0.png") == {"a": ["class0/0.png"], "b": ["class0/copy.png"]}
