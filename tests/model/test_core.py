"""Core deltas Δw = B C A: their fixed sides, files, compositions and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import assert_near, exact_jvp, images, moved, vit
from torch import nn

from tangent_ops import Ledger, compose, linearize, load_delta, save_delta
from tangent_ops.delta import DeltaMeta
from tangent_ops.errors import ArgumentError, DeltaError, DeltaFileError
from tangent_ops.model.low_rank import GRID, make_cores

QKV = "blocks.2.attn.qkv.weight"


def sides(model: nn.Module, name: str, out: int, within: int, seed: int = 0):
    """Orthonormal B (out, r_out) and A (r_in, in) for that parameter."""
    torch.manual_seed(seed)
    rows, columns = model.get_parameter(name).flatten(1).shape
    left = torch.linalg.qr(torch.randn(rows, out)).Q
    return left, torch.linalg.qr(torch.randn(columns, within)).Q.T.contiguous()


def test_given_sides_make_the_delta():
    model, x = vit(), images()
    left, right = sides(model, QKV, 4, 3)
    other = sides(model, "head.weight", 2, 2)
    tangent = moved(linearize(model, "qkv", core={QKV: (left, right), "head.weight": other}))
    core = tangent.deltas()[QKV]
    assert core.shape == (4, 3)
    assert tangent.deltas()["blocks.1.attn.qkv.weight"].shape == (144, 48)  # not in the mapping
    exact = left.double() @ core.detach().double() @ right.double()
    assert_near(tangent.full_delta_dict()[QKV], exact, 1e-6)
    whole = dict(tangent.full_delta_dict()) | {QKV: exact}
    assert_near(tangent.primal_and_tangent(x), exact_jvp(model, whole, x))
    assert torch.equal(tangent.left.tensors()[QKV], left)
    left.zero_()
    assert not torch.equal(tangent.left.tensors()[QKV], left)  # a copy


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**40))
def test_drawn_sides_are_orthonormal_and_of_the_name(out, within, seed):
    parameters = {n: torch.zeros(10, 5, 2) for n in ("v", "w")} | {"b": torch.zeros(10)}
    right, left = make_cores(parameters, (out, within), seed, parameters)
    assert right.keys() == left.keys() == {"v", "w"}
    assert left["w"].shape == (10, out) and right["w"].shape == (within, 10)
    for rows in (left["w"].T.double(), right["w"].double()):
        assert float((rows @ rows.T - torch.eye(len(rows))).abs().max()) <= 4 * GRID
        assert torch.equal(rows / GRID, (rows / GRID).round())
    if out == within:  # the sides of a square matrix are not the same
        assert not torch.allclose(left["w"].T, right["w"], atol=1e-3)
    assert not torch.allclose(left["v"], left["w"], atol=1e-3)


def test_parameters_that_are_too_small_keep_full_deltas(capsys):
    tangent = linearize(vit(), core=(5, 3))
    shapes = {name: tuple(delta.shape) for name, delta in tangent.deltas().items()}
    assert shapes[QKV] == (5, 3) and shapes["head.weight"] == (5, 48)
    assert tangent.rank is None and ", core:" in repr(tangent)
    tangent.summary()
    assert ", core)" in capsys.readouterr().out.splitlines()[0]


def test_files_and_compositions(tmp_path):
    model, x, path = vit(), images(), tmp_path / "shard.safetensors"
    one, two = (moved(linearize(model, core=(4, 3)), seed) for seed in (7, 8))
    save_delta(one.delta_dict(), path)
    delta = load_delta(path, anchor=one.fingerprint)
    assert delta.meta is not None
    assert (delta.meta.rank, delta.meta.basis) == (None, one.basis_fingerprint)
    both = linearize(model, core=(4, 3))
    both.load_delta_dict(compose([path, two.delta_dict()]))
    assert_near(both(x), (one(x).detach().double() + two(x).detach()) / 2)
    ledger = Ledger(tmp_path / "ledger", anchor=both)
    ledger.add("a", path)
    composed = ledger.composed()
    assert_near({n: composed[n] for n in one.deltas()}, dict(one.delta_dict()), 1e-6)
    assert composed.meta == DeltaMeta(
        one.fingerprint, one.model_name, one.trainable, basis=one.basis_fingerprint
    )
    with pytest.raises(DeltaError, match="is of rank 3, expected a core"):
        ledger.add("b", moved(linearize(model, rank=3)).delta_dict())


def test_the_fingerprint_covers_both_sides():
    model = vit()
    left, right = sides(model, QKV, 4, 3)
    others = sides(model, QKV, 4, 3, seed=1)
    pairs = [(left, right), (others[0], right), (left, others[1])]
    found = {linearize(model, "qkv", core={QKV: pair}).basis_fingerprint for pair in pairs}
    assert len(found) == 3 and None not in found


def test_state_dict_carries_both_sides():
    model, x = vit(), images()
    one, two = (moved(linearize(model, core=3, basis=seed), seed) for seed in (1, 2))
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(x), one(x)) and two.basis_fingerprint == one.basis_fingerprint


def test_deltas_of_another_kind_are_refused():
    model = vit()
    cases = {
        "core": linearize(model, "qkv", core=3),
        "other": linearize(model, "qkv", core=3, basis=1),
        "rank": linearize(model, "qkv", rank=3),
        "full": linearize(model, "qkv"),
    }
    messages = {
        ("core", "other"): "another basis",
        ("core", "rank"): r"is of rank 3, expected a core: load it into .*rank=3",
        ("core", "full"): r"is full, expected a core: load it into linearize\(\.\.\., rank=None\)",
        ("rank", "core"): r"is a core, expected of rank 3: load it into .*core=\.\.\.",
        ("full", "core"): r"is a core, expected full: full_delta_dict",
    }
    for (own, alien), message in messages.items():
        with pytest.raises(DeltaError, match=message):
            cases[own].load_delta_dict(cases[alien].delta_dict())
        with pytest.raises(DeltaError, match=message):
            compose([cases[own].delta_dict(), cases[alien].delta_dict()])


def test_a_file_of_a_core_with_a_rank_is_refused(tmp_path):
    path = tmp_path / "shard.safetensors"
    save_delta(moved(linearize(vit(), "qkv", core=3)).delta_dict(), path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata["format_version"] == "3"
    save_file(tensors, path, metadata | {"rank": "3"})
    with pytest.raises(DeltaFileError, match="has rank in its header, which format 3"):
        load_delta(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": 0}, r"core=0: expected a positive integer, two of them"),
        ({"core": True}, r"core=True: expected"),
        ({"core": (2, 2, 2)}, r"core=\(2, 2, 2\): expected"),
        ({"core": "all"}, r"core='all': expected"),
        ({"core": 2, "rank": 2}, r"rank and core exclude each other"),
        ({"core": 2, "basis": {}}, r"basis is a dict: expected an int, the seed"),
        ({"core": {}, "basis": 3}, r"seed of a random core: leave it out"),
        ({"core": {"w": ()}}, r"core has w, which the model does not have"),
        ({"core": {"weight": torch.eye(5)}}, r"core of weight is no pair"),
        ({"core": {"bias": (torch.eye(5), torch.eye(1))}}, r"core has bias, which is no matrix"),
        ({"core": {"weight": (torch.eye(5, 2).half(), torch.eye(2, 4))}}, r"torch.float16"),
        ({"core": {"weight": (0, torch.eye(2, 4))}}, r"transposed B of weight is a int"),
        ({"core": {"weight": (torch.eye(5, 2), torch.eye(2, 5))}}, r"A of weight has shape"),
        ({"core": {"weight": (torch.eye(2, 5), torch.eye(2, 4))}}, r"B of weight has shape \(5, 2"),
        ({"core": {"weight": (2 * torch.eye(5, 2), torch.eye(2, 4))}}, r"no orthonormal rows"),
    ],
)
def test_bad_cores(options, message):
    with pytest.raises(ArgumentError, match=message):
        linearize(nn.Linear(4, 5), **options)
