"""The private demo and its study, small, from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip("onnx", reason="the demo's extra is not installed")
pytest.importorskip("rich", reason="the demo's extra is not installed")
pytest.importorskip("matplotlib", reason="the demo's extra is not installed")
pytest.importorskip("sklearn", reason="the demo's extra is not installed")
pytest.importorskip("opacus", reason="the extra for privacy is not installed")
pytest.importorskip("dp_accounting", reason="the extra for privacy is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import private
import private_demo
import private_study
from images import load_images

from tangent_ops import load_delta
from tangent_ops.privacy.statement import statement_of


def tiny_vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2,
        num_classes=0, pretrained_cfg_overlay={"input_size": (3, 16, 16)},
    ).eval()  # fmt: skip


@pytest.fixture
def no_download(monkeypatch):
    for module in (private_demo, private_study):
        monkeypatch.setattr(module, "fetch", lambda asset, cache: Path("unused"))
        monkeypatch.setattr(module, "load_backbone", lambda path: tiny_vit())


def test_the_demo_prints_the_statement_and_keeps_it(no_download, tmp_path, capsys):
    options = ["--data", "digits", "--quick", "--epsilon", "2", "--out", str(tmp_path)]
    assert private_demo.main(options) == 0
    said = capsys.readouterr().out
    statement = statement_of(load_delta(tmp_path / "private.safetensors"))
    assert statement is not None
    assert str(statement) in said
    assert 1.9 < statement.epsilon <= 2.0
    assert "seed stays secret" not in said  # nobody knows it


def test_bad_options_end_with_a_message_and_status_2(no_download, tmp_path, capsys):
    options = ["--data", "digits", "--quick", "--epsilon", "-1", "--out", str(tmp_path)]
    assert private_demo.main(options) == 2
    assert "target_epsilon must be positive" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # Opacus' and PyTorch's own, of the comparator
def test_a_study_goes_on_where_it_was(no_download, tmp_path, monkeypatch):
    few = {"expected_batch_size": 40, "steps": 2, "lr": 1e-3, "max_grad_norm": 1.0}
    for name in ("TANGENT", "ORDINARY", "PROBE"):
        monkeypatch.setattr(private, name, few)
    monkeypatch.setattr(private, "FAILURE", 1e-4)
    monkeypatch.setattr(private_study, "EPSILONS", (1.0, 4.0))
    monkeypatch.setattr(private_study, "load_images", lambda *of: load_images("digits", *of[1:]))
    sizes = (60, 60, 60, 100)
    prepare = private_study.prepare
    monkeypatch.setattr(private_study, "prepare", lambda *of: prepare(*of, sizes=sizes))
    options = ["--seeds", "0", "1", "--out", str(tmp_path)]
    assert private_study.main(options) == 0
    path = tmp_path / "study.json"
    found = json.loads(path.read_text())
    assert len(found["runs"]) == 2 * (1 + 2 * 3 + 1)
    spent = [run["epsilon"] for name, run in found["runs"].items() if name.endswith("/4")]
    assert all(3.8 < epsilon <= 4.0 for epsilon in spent) and len(spent) == 6
    assert (tmp_path / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    kept = found["runs"].pop("1/probe/1")
    path.write_text(json.dumps(found))
    assert private_study.main(options) == 0
    again = json.loads(path.read_text())["runs"]
    assert again["1/probe/1"]["accuracy"] == kept["accuracy"]  # run anew, with its seed
