"""Damaged or hostile files are refused or read; nothing is executed or written elsewhere."""

from __future__ import annotations

import ast
import pickle
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shard_runs import make_plan, trained

import tangent_ops
from tangent_ops import Ledger, load_delta
from tangent_ops.errors import PlanError, TangentOpsError
from tangent_ops.shards import Plan, job, load_anchor, read_anchor, settle

REFUSED = (TangentOpsError, OSError)
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two shards, one trained and composed."""
    folder = tmp_path_factory.mktemp("fuzz")
    plan = make_plan(folder, shards=2)
    threads = torch.get_num_threads()
    assert "error" not in job.attempt(str(plan.path), "shard-0")
    torch.set_num_threads(threads)
    settle(plan)
    return plan.path


def damages() -> st.SearchStrategy[Callable[[bytes], bytes]]:
    """Functions that flip, cut, insert or replace bytes."""

    def flipped(content: bytes, seed: int, count: int) -> bytes:
        draw, found = random.Random(seed), bytearray(content)
        # Half of the damage goes to the headers, which are what parsers read.
        for _ in range(count):
            end = len(found) if draw.random() < 0.5 else min(2000, len(found))
            found[draw.randrange(end)] = draw.randrange(256)
        return bytes(found)

    def put(content: bytes, new: bytes, part: float) -> bytes:
        place = int(len(content) * part)
        return content[:place] + new + content[place:]

    seeds = st.integers(0, 2**32)
    return st.one_of(
        st.builds(lambda s, n: lambda b: flipped(b, s, n), seeds, st.integers(1, 40)),
        st.builds(lambda part: lambda b: b[: int(len(b) * part)], st.floats(0, 0.999)),
        st.builds(lambda new, part: lambda b: put(b, new, part), st.binary(min_size=1, max_size=50),
                  st.floats(0, 1)),
        st.builds(lambda new: lambda b: new, st.binary(max_size=300)),
    )  # fmt: skip


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def read_all(path: Path) -> str:
    """Reads everything in a run; returns the fingerprint of the anchor's weights."""
    plan = Plan.open(path)
    for shard in plan.shards():
        if shard.job is not None:
            plan.job(shard.name)
            assert plan.result_path(shard.job).parent == path / "deltas"
    return plan.tangent().fingerprint


@FUZZ
@given(damage=damages())
@pytest.mark.parametrize("name", ["plan.sqlite", "anchor.safetensors"])
def test_damaged_runs(run: Path, tmp_path: Path, name: str, damage) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for file in ("plan.sqlite", "anchor.safetensors"):
        shutil.copy(run / file, copy / file)
    (copy / "deltas").mkdir()
    (copy / name).write_bytes(damage((run / name).read_bytes()))
    before = tree(tmp_path)
    try:
        assert read_all(copy) == read_anchor(run / "anchor.safetensors").fingerprint
    except REFUSED as error:
        assert str(error)
    after = tree(tmp_path)
    assert {k: v for k, v in after.items() if not k.endswith("-journal")} == before


@FUZZ
@given(damage=damages())
def test_damaged_deltas(run: Path, tmp_path: Path, damage) -> None:
    (source,) = (run / "deltas").glob("*.safetensors")
    target = tmp_path / "delta"
    content = damage(source.read_bytes())
    target.write_bytes(content)
    try:
        found = load_delta(target)
    except REFUSED:
        return
    # A file that loads holds the original values: its content hash was checked.
    original = load_delta(source)
    assert found.meta == original.meta
    assert all(torch.equal(found[name], value) for name, value in original.items())


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER DELETE ON sample BEGIN DELETE FROM about; END",
        "CREATE VIEW v AS SELECT * FROM sample",
        "CREATE TABLE more (x)",
        "DROP INDEX sample_label",
        "PRAGMA user_version = 2",
        "PRAGMA application_id = 1",
        "UPDATE sample SET id = '../' || id",
        "UPDATE sample SET id = '/etc/passwd' WHERE target = 0 AND id LIKE '%0.png'",
        "UPDATE sample SET id = x'00ff' WHERE id LIKE 'class0/0%'",
        "UPDATE sample SET target = 'one'",
        "UPDATE sample SET target = -1",
        "UPDATE sample SET content = x'00'",
        "UPDATE shard SET name = 'a' || char(10) || 'b' WHERE number = 0",
        "UPDATE shard SET name = '' WHERE number = 0",
        "DELETE FROM about WHERE key = 'recipe'",
        "INSERT INTO about VALUES ('more', '1')",
        "UPDATE about SET value = 'x' WHERE key = 'recipe'",
        "UPDATE about SET value = '[1]' WHERE key = 'recipe'",
        "UPDATE about SET value = '{\"epochs\": 1e999}' WHERE key = 'recipe'",
        "UPDATE about SET value = '{\"epoch\": 1}' WHERE key = 'recipe'",
        "UPDATE about SET value = '{\"lr\": NaN}' WHERE key = 'recipe'",
        "UPDATE about SET value = '{\"root\": 1}' WHERE key = 'data'",
        'UPDATE about SET value = \'{"root": "", "name": "torch/cifar10"}\' WHERE key = "data"',
        "UPDATE about SET value = '0' WHERE key = 'anchor'",
        "UPDATE about SET value = 'equal' WHERE key = 'weights'",
        "DELETE FROM about WHERE key = 'weights'",
        f"UPDATE about SET value = '{'[' * 5000}' WHERE key = 'data'",
    ],
)  # fmt: skip
def test_edited_plans(run: Path, tmp_path: Path, statement: str) -> None:
    copy = tmp_path / "edited"
    shutil.copytree(run, copy)
    with closing(sqlite3.connect(copy / "plan.sqlite")) as connection, connection:
        connection.execute(statement)
    with pytest.raises(PlanError):
        read_all(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "hf-hub:timm/vit"),
        ("name", "local-dir:/tmp"),
        ("name", "no_such_model"),
        ("options", '{"num_classes": 4, "checkpoint_path": "/tmp/x.pth"}'),
        ("options", '{"num_classes": 4, "pretrained": true}'),
        ("options", '{"num_classes": -4}'),
        ("options", '{"num_classes": 4, "img_size": 99999999}'),
        ("options", '{"num_classes": 1e9}'),
        ("options", "[" * 5000),
        ("options", '"abc"'),
        ("classes", "3"),
        ("input", '{"input_size": [3, "x", 1]}'),
        ("input", '{"input_size": [3, 1e400, 1]}'),
        ("input", "null"),
        ("format", "other"),
        ("format_version", "9"),
    ],
)
def test_edited_anchors(run: Path, tmp_path: Path, key: str, value: str) -> None:
    from safetensors import safe_open

    with safe_open(run / "anchor.safetensors", framework="pt") as file:
        metadata = {**file.metadata(), key: value}
    save_file(load_file(run / "anchor.safetensors"), tmp_path / "anchor", metadata=metadata)
    with pytest.raises(PlanError):
        load_anchor(tmp_path / "anchor")


def test_a_header_without_end(tmp_path: Path) -> None:
    endless = (2**63).to_bytes(8, "little") + b"{}"
    for content in (b"", b"\xff" * 8, endless, b"\x02" + b"\0" * 7 + b"[]"):
        (tmp_path / "file").write_bytes(content)
        for read in (read_anchor, load_delta):
            with pytest.raises(REFUSED):
                read(tmp_path / "file")


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder of images to a composition, with every unpickler replaced by an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    plan = trained(make_plan(tmp_path, shards=2))
    settle(plan)
    assert len(Ledger(plan.ledger_path, create=False).composed())


def test_no_line_of_ours_executes_data() -> None:
    """The sources neither unpickle nor evaluate data; torch.load reads weights only."""
    found = []
    for path in Path(tangent_ops.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                safe = any(
                    k.arg == "weights_only" and ast.unparse(k.value) == "True"
                    for k in node.keywords
                )
                if name in ("eval", "exec", "yaml.load", "pickle.load", "pickle.loads") or (
                    name == "torch.load" and not safe
                ):
                    found.append(f"{path.name}: {ast.unparse(node)[:80]}")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                if {"pickle", "dill", "marshal", "shelve", "joblib"} & set(names):
                    found.append(f"{path.name}: {ast.unparse(node)}")
    assert not found
