"""Low-rank deltas Δw = B A: against float64, their bases, files and compositions."""

from __future__ import annotations

import copy
import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import assert_near, exact_jvp, exact_vjp, generator, images, moved, vit
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tangent_ops import (
    Delta,
    compose,
    fit,
    gradient_basis,
    last_blocks,
    linearize,
    load_delta,
    save_delta,
)
from tangent_ops.errors import ArgumentError, DeltaError, NonFiniteLossError
from tangent_ops.model.low_rank import GRID, make_bases

QKV = "blocks.2.attn.qkv.weight"


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.grouped(torch.tanh(self.first(x)))).mean((2, 3)))


def batch(count: int = 12) -> TensorDataset:
    return TensorDataset(images(count), torch.arange(count) % 5)


def products(tangent) -> dict[str, Tensor]:
    """Δw in float64, from the model's own B and A."""
    found = {}
    for name, delta in tangent.deltas().items():
        basis, parameter = tangent.basis.tensors().get(name), tangent.anchor.get_parameter(name)
        exact = delta.detach().double()
        found[name] = exact if basis is None else (exact @ basis.double()).view(parameter.shape)
    return found


# --- value, tangent, gradient ----------------------------------------------------------------


@pytest.mark.parametrize("make", [vit, Convolutions])
def test_value_tangent_and_gradient(make):
    model, x = make(), images()
    tangent = moved(linearize(model, rank=3))
    bases = tangent.basis.tensors()
    assert len(bases) == {vit: 14, Convolutions: 3}[make]  # 4 matrices in 3 blocks, patches, head

    full = products(tangent)
    exact = exact_jvp(model, full, x)
    assert_near(tangent.primal_and_tangent(x), exact)
    output = tangent(x)
    cotangent = torch.randn(output.shape, generator=generator(6))
    output.backward(cotangent)
    gradients = exact_vjp(model, list(full), cotangent, x)
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, delta in tangent.deltas().items():
        gradient = gradients[name]
        if name in bases:
            gradient = gradient.flatten(1) @ bases[name].double().T
            assert delta.shape == (len(gradients[name]), 3)
        assert delta.grad is not None
        assert float((delta.grad - gradient).abs().max()) <= 2e-5 * largest, name


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_any_shape_of_a_matrix(rows, columns, rank, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(columns, rows).double()
    tangent = moved(linearize(layer, rank=rank, basis=seed), seed)
    low = rank < min(rows, columns)
    assert tangent.rank == (rank if low else None)
    assert tangent.deltas()["weight"].shape == (rows, rank if low else columns)
    x = torch.randn(4, columns, generator=generator(seed), dtype=torch.float64)
    full = products(tangent)
    assert_near(
        tangent(x), F.linear(x, layer.weight + full["weight"], layer.bias + full["bias"]), 1e-12
    )


def test_every_direction_in_the_rows_gives_what_a_full_delta_gives():
    """The inputs span 5 of 6 directions, so rank 5 is enough."""
    torch.manual_seed(2)
    layer = nn.Linear(6, 8).double()
    rows = torch.linalg.qr(torch.randn(6, 5, dtype=torch.float64)).Q.T.contiguous()
    x = torch.randn(9, 5, dtype=torch.float64) @ rows
    data = TensorDataset(x, torch.arange(9) % 8)
    options = {"epochs": 3, "lr": 0.1, "optimizer": "sgd", "progress": False}
    low, full = linearize(layer, rank=5, basis={"weight": rows}), linearize(layer)
    fit(low, data, **options)
    fit(full, data, **options)
    assert_near(low(x), full(x).detach(), 1e-12)
    assert_near(dict(low.full_delta_dict()), dict(full.delta_dict()), 1e-12)


@pytest.mark.parametrize("how", ["compiled", "torch.func", "autocast"])
def test_other_ways_to_call(how):
    model, x = vit(depth=1), images()
    tangent = moved(linearize(model, rank=3))
    exact = sum(exact_jvp(model, products(tangent), x))
    if how == "compiled":
        assert_near(torch.compile(tangent, fullgraph=True, backend="aot_eager")(x), exact)
    elif how == "torch.func":
        found = torch.func.vmap(lambda image: tangent(image[None])[0])(x)
        assert_near(found, exact)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = tangent(x)
            assert_near(dict(tangent.full_delta_dict()), products(tangent), 1e-6)  # not rounded
        assert_near(found, exact, 0.05)


def test_split_shares_deltas_and_bases():
    model, x = vit(), images()
    tangent = moved(linearize(model, last_blocks(model, 1), rank=3))
    trunk, tail = tangent.split()
    assert_near(tail(trunk(x)), tangent(x).detach(), 1e-6)
    assert tail.deltas()[QKV] is tangent.deltas()[QKV]
    assert (tail.rank, tail.basis_fingerprint) == (3, tangent.basis_fingerprint)
    tail.double()  # moves what they share
    assert {b.dtype for b in tangent.basis.tensors().values()} == {torch.float64}


# --- training --------------------------------------------------------------------------------


def test_the_loss_is_a_parabola_along_any_line_and_fit_descends():
    model, data = vit().double(), batch()
    tangent = linearize(model, last_blocks(model, 1), rank=2)
    x, targets = images(12).double(), torch.arange(12) % 5
    data = TensorDataset(x, targets)

    def loss(logits, targets):
        return (logits - 3 * F.one_hot(targets, 5)).square().mean()

    start, end = tangent.delta_dict(), moved(tangent, scale=1.0).delta_dict()
    values = []
    for t in range(-2, 3):  # a third difference is 0, a second one is not negative
        tangent.load_delta_dict(compose([start, end], [1 - t, t]))
        values.append(loss(tangent(x), targets).detach())
    third = torch.stack(values).diff(n=3).abs().max()
    assert third <= 1e-12 * max(values)
    assert (torch.stack(values).diff(n=2) > 0).all()

    tangent.load_delta_dict(start)
    before = tangent.basis_fingerprint
    history = fit(tangent, data, loss=loss, epochs=5, lr=1e-2, cache=True, progress=False)
    assert history.loss[-1] < 0.9 * history.loss[0]
    tangent._record.anchor_changes()
    assert tangent.basis_fingerprint == before  # A is fixed


def test_counts_of_parameters(capsys):
    model = vit()
    tangent = linearize(model, rank=2)
    for name, delta in tangent.deltas().items():
        parameter = model.get_parameter(name)
        matrix = parameter.flatten(1) if parameter.ndim > 1 else parameter[None]
        expected = 2 * len(matrix) if min(matrix.shape) > 2 else parameter.numel()
        assert delta.numel() == expected, name
    trained = {n for n, p in tangent.named_parameters() if p.requires_grad}
    assert trained == {f"delta.{n}" for n in tangent.deltas()}
    tangent.summary()
    printed = capsys.readouterr().out
    assert "rank 2" in printed.splitlines()[0]
    total = sum(delta.numel() for delta in tangent.deltas().values())
    assert printed.splitlines()[-1].split() == ["total", f"{total:,}", "0"]


# --- bases -----------------------------------------------------------------------------------


def test_a_seed_gives_the_same_basis_whatever_is_trained():
    model = vit()
    everything = linearize(model, rank=3, basis=7).basis.tensors()
    again = linearize(model, last_blocks(model, 1), rank=3, basis=7)
    assert torch.equal(again.basis.tensors()[QKV], everything[QKV])
    before = again.basis_fingerprint
    assert linearize(model, last_blocks(model, 1), rank=3, basis=7).basis_fingerprint == before
    assert linearize(model, last_blocks(model, 1), rank=3, basis=8).basis_fingerprint != before
    other = everything["blocks.1.attn.qkv.weight"]
    assert not torch.allclose(other, everything[QKV], atol=0.1)  # drawn for each name
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert linearize(model, rank=3, basis=7).basis_fingerprint == (
            linearize(model, rank=3, basis=7).basis_fingerprint
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(-3, 2**40))
def test_drawn_rows_are_orthonormal_and_on_the_grid(rank, more, seed):
    parameter = torch.zeros(100, rank + more)
    rows = make_bases({"w": parameter}, rank, seed, ["w"])["w"].double()
    assert rows.shape == (rank, rank + more)
    # An entry is rounded by GRID / 2; a product of two rows of length 1 moves by their sum at most.
    distance = (rows @ rows.T - torch.eye(rank)).abs().max()
    assert distance <= 1.01 * GRID * (rank + more) ** 0.5
    assert torch.equal(rows / GRID, (rows / GRID).round())


def test_the_drawn_rows_are_those_that_files_were_written_for():
    """Gram-Schmidt, in numpy, of a Gaussian with that seed and name."""
    found = make_bases({"w": torch.zeros(9, 6)}, 3, 5, ["w"])["w"].double().numpy()
    digest = hashlib.sha256(b"5:w").digest()
    source = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    gaussian = torch.randn(6, 3, generator=source, dtype=torch.float64).numpy()
    expected = np.linalg.solve(np.linalg.cholesky(gaussian.T @ gaussian), gaussian.T)
    assert np.abs(found - expected).max() <= 0.51 * GRID


def test_gradient_basis_is_that_of_the_gradients_svd():
    model, data = vit(drop_rate=0.5).train(), batch()
    found = gradient_basis(model, data, 3, trainable="blocks.2", batch_size=5)
    exact = copy.deepcopy(model).double().eval()
    names = [n for n, p in exact.named_parameters() if n.startswith("blocks.2") and p.ndim == 2]
    x, targets = images(12).double(), torch.arange(12) % 5
    square = (exact(x) - 15 * F.one_hot(targets, 5)).square().mean()
    gradients = torch.autograd.grad(square, [exact.get_parameter(n) for n in names])
    assert list(found) == names
    for name, gradient in zip(names, gradients, strict=True):
        rows = found[name].double()
        assert rows.dtype == torch.float64 and found[name].dtype == torch.float32
        # The best approximation of that rank: no subspace, of whatever basis, leaves less.
        best = torch.linalg.svdvals(gradient)[3:].square().sum().sqrt()
        left = (gradient - gradient @ rows.T @ rows).norm()
        assert left <= best + 1e-5 * gradient.norm()
        assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()
    tangent = linearize(model, "blocks.2", rank=3, basis=found)
    assert torch.equal(tangent.basis.tensors()[QKV], found[QKV])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_gradient_basis_refuses_what_has_no_such_gradient():
    model = vit()
    with pytest.raises(ArgumentError, match=r"rank=0: expected a positive integer"):
        gradient_basis(model, batch(), 0)
    with pytest.raises(ArgumentError, match="linearized already"):
        gradient_basis(linearize(model), batch(), 2)
    with pytest.raises(ArgumentError, match=r"head\.weight has rank 1 .*rank=3.*basis=0"):
        gradient_basis(model, batch(1), 3, trainable="head")
    with pytest.raises(ArgumentError, match=r"does not depend on patch.*leave it out"):
        gradient_basis(model, batch(), 3, loss=lambda y, t: model.head.bias.square().sum())
    broken = TensorDataset(torch.full((2, 3, 16, 16), torch.nan), torch.zeros(2, dtype=torch.long))
    with pytest.raises(NonFiniteLossError, match="not finite"):
        gradient_basis(model, broken, 3)
    assert gradient_basis(model, batch(), 3, trainable="bias") == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank=0: expected a positive integer"),
        ({"rank": 2.0}, r"rank=2\.0: expected"),
        ({"rank": True}, r"rank=True: expected"),
        ({"basis": 3}, r"basis is for low-rank deltas only: pass rank"),
        ({"basis": {}}, r"basis is for low-rank deltas only: pass rank"),
        ({"rank": 2, "basis": "random"}, r"basis is a str: expected an int, the seed"),
        ({"rank": 2, "basis": {}}, r"basis lacks weight: give each"),
        ({"rank": 2, "basis": {"weight": 0, "w": 0}}, r"basis has w, which the model does"),
        ({"rank": 2, "basis": {"weight": 0}}, r"basis of weight is a int: expected float32"),
        ({"rank": 2, "basis": {"weight": torch.eye(2, 4).half()}}, r"is a torch.float16: expected"),
        ({"rank": 2, "basis": {"weight": torch.eye(2, 3)}}, r"shape \(2, 3\): expected \(2, 4\)"),
        ({"rank": 2, "basis": {"weight": 2 * torch.eye(2, 4)}}, r"no orthonormal rows: A Aᵀ is 3"),
        ({"rank": 2, "basis": {"weight": torch.full((2, 4), torch.nan)}}, r"no orthonormal rows"),
    ],
)
def test_bad_ranks_and_bases(options, message):
    with pytest.raises(ArgumentError, match=message):
        linearize(nn.Linear(4, 5), **options)


def test_a_given_basis_may_cover_more_than_is_trained_and_is_copied():
    given = {name: torch.eye(2, 4) for name in ("0.weight", "1.weight")}
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tangent = linearize(model, "1", rank=2, basis=given)
    given["1.weight"].zero_()
    assert torch.equal(tangent.basis.tensors()["1.weight"], torch.eye(2, 4))


# --- deltas ----------------------------------------------------------------------------------


def test_composition_averages_outputs_and_commutes_with_expansion():
    model, x = vit(), images()
    parts = [moved(linearize(model, rank=3), seed) for seed in (7, 8)]
    both = linearize(model, rank=3)
    both.load_delta_dict(compose([p.delta_dict() for p in parts]))
    assert_near(both(x), (parts[0](x).detach().double() + parts[1](x).detach()) / 2)

    full = linearize(model)
    full.load_delta_dict(compose([p.full_delta_dict() for p in parts]))
    assert_near(full(x), both(x).detach().double())
    assert_near(dict(both.full_delta_dict()), {n: d.detach() for n, d in full.deltas().items()})
    assert_near(dict(both.full_delta_dict()), products(both), 1e-6)


def test_file_round_trip(tmp_path):
    path, model, x = tmp_path / "shard.safetensors", vit(), images()
    tangent = moved(linearize(model, rank=3, basis=5))
    save_delta(tangent.delta_dict(), path)
    twin = linearize(model, rank=3, basis=5)
    delta = load_delta(path, anchor=twin.fingerprint)
    assert delta.meta is not None
    assert (delta.meta.rank, delta.meta.basis) == (3, tangent.basis_fingerprint)
    twin.load_delta_dict(compose([path]))
    assert torch.equal(twin(x), tangent(x))
    assert path.stat().st_size < 0.35 * sum(4 * p.numel() for p in model.parameters())


def test_deltas_of_another_kind_or_basis_are_refused(tmp_path):
    model, path = vit(), tmp_path / "shard.safetensors"
    low, other, wide = (
        moved(linearize(model, "qkv", rank=rank, basis=basis))
        for rank, basis in ((3, 0), (3, 1), (4, 0))
    )
    full = moved(linearize(model, "qkv"))
    cases = [
        (low, other, "has another basis.*Linearize with the basis"),
        (low, wide, r"is of rank 4, expected of rank 3: load it into linearize\(\.\.\., rank=4\)"),
        (low, full, r"is full, expected of rank 3: load it into linearize\(\.\.\., rank=None\)"),
        (full, low, r"is of rank 3, expected full: full_delta_dict\(\)"),
    ]
    for own, alien, message in cases:
        before = own.delta_dict()
        save_delta(alien.delta_dict(), path)
        for attempt in (
            lambda: own.load_delta_dict(alien.delta_dict()),  # noqa: B023
            lambda: own.load_delta_dict(load_delta(path)),  # noqa: B023
            lambda: compose([own.delta_dict(), path]),  # noqa: B023
        ):
            with pytest.raises(DeltaError, match=message):
                attempt()
        assert all(torch.equal(d, before[n]) for n, d in own.deltas().items())
    with pytest.raises(DeltaError, match=r"qkv\.weight has shape \(144, 48\), expected \(144, 3\)"):
        low.load_delta_dict(dict(full.delta_dict()))  # of unknown origin


def test_state_dict_carries_the_bases():
    model, x = vit(), images()
    one = moved(linearize(model, rank=3, basis=1))
    two = linearize(model, rank=3, basis=2)
    stale = two.basis_fingerprint
    assert {f"basis.{n}" for n in one.basis.names} < one.state_dict().keys()
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(x), one(x))
    assert two.basis_fingerprint == one.basis_fingerprint != stale


def test_without_a_matrix_large_enough_deltas_are_full():
    tangent = linearize(vit(), "bias", rank=3)
    assert tangent.rank is None and tangent.basis_fingerprint is None
    delta = tangent.delta_dict()
    assert isinstance(delta, Delta) and delta.meta is not None
    assert (delta.meta.rank, delta.meta.basis) == (None, None)
