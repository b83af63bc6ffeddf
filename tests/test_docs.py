"""The code on pages of docs/ runs, each page's in order, as one program."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import assert_near, images, vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Subset, TensorDataset

import tangent_ops
from tangent_ops.exact import Problem
from tangent_ops.ops.backend import interpreting

DOCS = Path(__file__).parents[1] / "docs"
INSTALLED = importlib.util.find_spec("jvp_flash_attention") is not None


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_precision() -> None:
    (block,) = blocks_of("precision.md")
    names: dict[str, Any] = {}
    exec(block, names)
    assert all(delta.any() for delta in names["tangent"].deltas().values())
    assert names["scaler"].get_scale() == 1024  # no step was skipped


@pytest.mark.gpu
def test_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay computes what an eager call does, with the deltas that there are then."""
    model = vit(depth=2, img_size=32, num_classes=10)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)
    inference, training = blocks_of("cuda-graphs.md")
    names: dict[str, Any] = {}
    exec(inference, names)
    deltas = names["tangent"].deltas()
    with torch.no_grad():
        for delta in deltas.values():
            delta.normal_(std=0.02)
    names["inference"].replay()
    torch.testing.assert_close(names["outputs"], names["infer"](), rtol=1e-4, atol=1e-5)

    exec(training, names)
    state = copy.deepcopy(names["optimizer"].state_dict())
    before = {name: delta.detach().clone() for name, delta in deltas.items()}
    names["training"].replay()
    replayed = {name: delta.detach().clone() for name, delta in deltas.items()}
    with torch.no_grad():
        for name, delta in deltas.items():
            delta.copy_(before[name])
    names["optimizer"].load_state_dict(state)
    names["step"]()
    for name, delta in deltas.items():
        moved = float((replayed[name] - before[name]).norm())
        assert float((replayed[name] - delta.detach()).norm()) <= 1e-3 * moved + 1e-7, name
    assert any(float((replayed[name] - before[name]).norm()) > 1e-4 for name in before)


PROMISES = sorted(path.name for path in (DOCS / "promises").glob("*.md"))


@pytest.mark.parametrize("page", PROMISES)
def test_promises(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(f"promises/{page}")
    assert blocks or page == "README.md"
    if not blocks:
        return
    (tmp_path / "models").mkdir()
    if "matplotlib" in "".join(blocks):
        pytest.importorskip("matplotlib", reason="the extra for plots is not installed")
    if "tangent_ops.privacy" in "".join(blocks):
        pytest.importorskip("opacus", reason="the extra for privacy is not installed")
    names = setting()
    for block in blocks:
        exec(block, names)
    assert all(value.isfinite().all() for value in names["tangent"].deltas().values())


def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert 10 <= len([line for line in block.splitlines() if line]) <= 13
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: vit(depth=1))
    public, private = (TensorDataset(images(12, seed=k), torch.arange(12) % 4) for k in (1, 2))
    shards = {f"customer-{k}": Subset(private, range(4 * k - 24, 4 * k - 20)) for k in (6, 7, 8)}
    names = {"public_set": public, "shards": shards, "photos": Subset(private, [9])}
    exec(block, names)
    never = tangent_ops.statistics(names["tangent"], Subset(private, [0, 1, 2, 3, 8, 10, 11]))
    assert names["ledger"].statistics() == never
    expected = never.choose().delta
    assert all(torch.equal(d, expected[n]) for n, d in names["tangent"].deltas().items())


def setting() -> dict[str, Any]:
    """Small versions of the names that the pages use without defining them."""
    model = vit(depth=1, embed_dim=12, num_heads=2)
    tangent = tangent_ops.linearize(model)
    train_set = TensorDataset(images(12), torch.arange(12) % 4)
    shards = {f"customer-{k}": Subset(train_set, range(4 * k - 24, 4 * k - 20)) for k in (6, 7, 8)}
    shard_deltas = {}
    for name, shard in shards.items():
        for delta in tangent.deltas().values():
            delta.data.zero_()
        tangent_ops.fit_exact(Problem(tangent, shard, l2=10.0, progress=False))
        shard_deltas[name] = tangent.delta_dict()
    return {
        "model": model,
        "tangent": tangent,
        "tangent_ops": tangent_ops,
        "train_set": train_set,
        "retain_set": Subset(train_set, range(8)),
        "public_set": TensorDataset(images(8, seed=7), torch.arange(8) % 4),
        "validation_set": TensorDataset(images(4, seed=5), torch.arange(4)),
        "vit": model,
        "images_to_forget": Subset(shards["customer-7"], [0]),
        "shards": shards,
        "shard_deltas": shard_deltas,
        "inputs": images(2, seed=6),
        "targets": torch.arange(2),
    }


def test_jvp_recipes() -> None:
    """The blocks run as shown; what they compute is what PyTorch does in float64 by MATH."""
    names: dict[str, Any] = {}
    blocks = blocks_of("jvp-recipes.md")
    for block in blocks:
        exec(block, names)
    assert all(1 <= len(block.strip().splitlines()) <= 11 for block in blocks[1:])
    exact = copy.deepcopy(names["model"]).double()
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    z, v, r, t, s, x, x_t, scale, dt, data, noise = (
        names[name].detach().double()
        for name in ("z", "v", "r", "t", "s", "x", "x_t", "scale", "dt", "data", "noise")
    )
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tangents = (v, torch.zeros_like(r), torch.ones_like(t))
        _, u_t = torch.func.jvp(exact, (z, r, t), tangents)
        times = (x, torch.zeros_like(t), s.flatten())
        _, f_t = torch.func.jvp(exact, times, (scale * x_t, torch.zeros_like(t), dt))
    assert_near(names["u_t"], u_t)
    assert_near(names["f_t"], f_t)
    step = 1e-5
    with torch.no_grad():  # along the path of sCM, by differences
        after, before = (
            exact(s.add(d).cos() * data + s.add(d).sin() * noise, 0 * t, s.add(d).flatten())
            for d in (step, -step)
        )
    assert_near(names["f_t"], scale * (after - before) / (2 * step), 1e-4)
    with sdpa_kernel(SDPBackend.MATH):
        product = torch.autograd.functional.vhp(
            lambda x: exact(x, r, t).square().sum(), data, noise
        )[1]
    assert_near(names["product"], product)
    classifier = names["classifier"]
    weights = {name: p.detach() for name, p in classifier.named_parameters()}
    rows = torch.func.jacrev(lambda w: torch.func.functional_call(classifier, w, (names["data"],)))(
        weights
    )
    flat = torch.cat([row.flatten(2).flatten(0, 1) for row in rows.values()], dim=1)
    assert_near(names["kernel"], (flat @ flat.T).double())
    assert names["covariance"].shape == (2, 3, 3) and (names["deviation"] > 0).all()


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")  # the rival's
def test_coming_from() -> None:
    device = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
    blocks = blocks_of("coming-from.md")
    assert len(blocks) == 5
    names: dict[str, object] = {}
    tangents = []
    with torch.device(device):
        for block in blocks:
            if "jvp_flash_attention" in block and not (
                INSTALLED and (interpreting() or device == "cuda")
            ):
                continue
            exec(block, names)
            if "y_t" in names:
                tangents.append(names["y_t"])
    assert len(tangents) >= 3
    for tangent in tangents[1:]:
        torch.testing.assert_close(tangent, tangents[0], rtol=1e-4, atol=1e-4)
