"""``tangent-ops certify``: its bounds by autograd, and that it finds what does not hold."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_runs import parsed, refused, run
from PIL import Image
from safetensors.torch import load_file
from shard_runs import make_plan, trained
from timm.data.transforms_factory import create_transform
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_ops import Delta, load_delta, load_statistics, save_delta
from tangent_ops.shards import ImageData, Plan, load_anchor, settle
from tangent_ops.shards.results import write_statistics

pytestmark = pytest.mark.usefixtures("in_this_process")

L2, K, M = 0.1, 1.0, 15.0  # of the run, and of the rescaled square loss


def mine(folder: Path, to: Path) -> Path:
    """A copy of the run, which may be changed; it reads the original's images."""
    shutil.copytree(folder / "run", to / "run")
    return to / "run"


def gradient_over_l2(folder: Path, plan: Plan, shard: str) -> float:
    """‖∇F(Δ)‖ / l2 in float64, by autograd through torch.func.jvp of timm's own model."""
    model, info = load_anchor(plan.anchor_path)
    model = model.double()
    job = plan.job(shard)
    transform = create_transform(**info.input)
    images = [Image.open(folder / "images" / s.id).convert("RGB") for s in job.samples]
    inputs = torch.stack([transform(image) for image in images]).double()
    targets = torch.tensor([sample.target for sample in job.samples])
    delta = {k: v.double() for k, v in load_file(plan.result_path(job.hash)).items()}
    delta = {name: value.requires_grad_() for name, value in delta.items()}
    weights = {name: value.detach() for name, value in model.named_parameters()}
    tangents = {**{name: torch.zeros_like(value) for name, value in weights.items()}, **delta}
    with sdpa_kernel(SDPBackend.MATH):
        primal, tangent = torch.func.jvp(
            lambda w: torch.func.functional_call(model, w, (inputs,)), (weights,), (tangents,)
        )
    logits = primal + tangent
    right = torch.nn.functional.one_hot(targets, logits.shape[1]).bool()
    loss = torch.where(right, K * (logits - M) ** 2, logits**2).mean()
    size = sum(value.square().sum() for value in delta.values())
    found = torch.autograd.grad(loss + L2 / 2 * size, list(delta.values()))
    return sum(float(value.square().sum()) for value in found) ** 0.5 / L2


def claims(result) -> dict[tuple[str, str], dict]:
    return {(claim["what"], claim["name"]): claim for claim in parsed(result)["claims"]}


def test_bounds_are_those_of_autograd(exact_folder: Path) -> None:
    result = run("certify", exact_folder / "run", "--json")
    assert result.exit_code == 0, result.output
    found = claims(result)
    names = [("fit", f"shard-{index}") for index in range(3)]
    assert [*found] == [*names, ("sum", "ledger"), ("composition", "lossless")]
    assert all(claim["holds"] for claim in found.values())
    plan = Plan.open(exact_folder / "run")
    expected = gradient_over_l2(exact_folder, plan, "shard-1")
    delta = load_delta(plan.result_path(plan.job("shard-1").hash))
    size = sum(float(value.double().square().sum()) for value in delta.values()) ** 0.5
    # The frozen blocks run in float32 in the run, and in float64 here.
    rounding = 32 * torch.finfo(torch.float32).eps * size
    assert found["fit", "shard-1"]["bound"] == pytest.approx(expected, rel=0, abs=rounding)
    assert found["fit", "shard-1"]["claimed"] == pytest.approx(1e-3 * size, rel=1e-3)


def test_a_moved_delta_and_a_changed_image_are_found(exact_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(exact_folder, tmp_path / "all")
    out = tmp_path / "all" / "run"
    plan = Plan.open(out)
    plan.relocate(ImageData(str(tmp_path / "all" / "images")), progress=False)
    path = plan.result_path(plan.job("shard-1").hash)
    delta = load_delta(path)
    save_delta(Delta({name: value * 1.01 for name, value in delta.items()}, delta.meta), path)
    other = plan.job("shard-2").samples[0].id
    (tmp_path / "all" / "images" / other).write_bytes(b"other")
    result = run("certify", out, "--json")
    assert result.exit_code == 1
    found = claims(result)
    assert found["fit", "shard-0"]["holds"]
    assert not found["fit", "shard-1"]["holds"]
    assert found["fit", "shard-1"]["why"] == "the bound is larger than what is claimed"
    assert f"{other!r} is not what it was when the plan was made" in found["fit", "shard-2"]["why"]
    assert not found["composition", "lossless"]["holds"]


def test_the_certificate_of_a_removal_is_recomputed(exact_folder: Path, tmp_path: Path) -> None:
    out = mine(exact_folder, tmp_path)
    assert run("forget", out, "--sample", "class1/1.png", "--yes").exit_code == 0
    plan = Plan.open(out)
    found = claims(run("certify", out, "--json"))
    (name,) = [key for key in found if key[0] == "removal"]
    assert all(claim["holds"] for claim in found.values())
    assert found[name]["bound"] == pytest.approx(found[name]["claimed"], rel=1e-6)
    path = plan.result_path(plan.job(name[1]).hash)
    delta = load_delta(path)
    assert delta.meta is not None
    less = delta.meta.extra["certificate"].replace(
        f'"distance_bound": {found[name]["claimed"]}', '"distance_bound": 1e-9'
    )
    assert less != delta.meta.extra["certificate"]
    extra = {**delta.meta.extra, "certificate": less}
    save_delta(delta, path, meta=replace(delta.meta, extra=extra))
    result = run("certify", out, "--json")
    assert result.exit_code == 1
    assert "claims a distance of 1e-09 at most" in claims(result)[name]["why"]


def test_statistics_are_compared_bit_for_bit(statistics_folder: Path, tmp_path: Path) -> None:
    out = mine(statistics_folder, tmp_path)
    assert "6 of 6 claims hold" in run("certify", out).stdout
    found = claims(run("certify", out, "--json"))
    shards = [("sum", f"shard-{index}") for index in range(3)]
    rest = [("sum", "ledger"), ("sum", "sum of the files"), ("composition", "statistics")]
    assert [*found] == [*shards, *rest]
    assert found["composition", "statistics"]["bound"] == 0
    plan = Plan.open(out)
    path = plan.result_path(plan.job("shard-0").hash)
    statistics = load_statistics(path)
    next(iter(statistics.terms.values())).view(-1)[0] += 1
    write_statistics(plan, plan.job("shard-0"), statistics)  # a sound file, of other sums
    result = run("certify", out)
    assert result.exit_code == 1
    assert "the sum differs from that of the files" in result.stdout
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    result = run("certify", out)
    assert (result.exit_code, "was changed after it was written" in result.stdout) == (1, True)


def test_a_run_by_steps_has_no_certificate(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    refused(run("certify", plan.path), "begin a run with --method exact or --method statistics")
    exact = make_plan(tmp_path, run="exact", method="exact", l2=0.1)
    refused(run("certify", exact.path), "has no trained shard")


@pytest.mark.long
def test_cross_entropy_is_certified_too(tmp_path: Path) -> None:
    plan = trained(make_plan(tmp_path, shards=1, method="exact", l2=0.1, loss="cross-entropy"))
    settle(plan)
    found = claims(run("certify", plan.path, "--json"))
    assert found["fit", "shard-0"]["holds"]
