"""Least-squares weights against numpy's lstsq on the dense Jacobian."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_deltas import random_deltas
from small_models import exact_jvp, images, vit
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

import tangent_ops
from tangent_ops.composition.compose import compose
from tangent_ops.composition.least_squares import LeastSquaresWeights
from tangent_ops.errors import ArgumentError, DeltaError
from tangent_ops.losses import RescaledSquareLoss


def dense(tangent, deltas, data):
    """f0 (N, C) and F (N, C, K), by the whole Jacobian."""
    inputs = data.tensors[0]
    weights = dict(tangent.anchor.named_parameters())
    jacobian = jacrev(lambda w: functional_call(tangent.anchor, w, (inputs,)))(weights)
    columns = [
        sum(torch.tensordot(jacobian[n], delta[n].double(), delta[n].ndim) for n in delta)
        for delta in deltas
    ]
    return tangent.anchor(inputs).detach(), torch.stack(columns, dim=2).detach()


def oracle(tangent, deltas, data, k=1.0, M=15.0, ridge=0.0):
    """The weights by numpy's lstsq on the rows that RescaledSquareLoss(k, M) squares."""
    outputs, columns = dense(tangent, deltas, data)
    target = F.one_hot(data.tensors[1], 3).double()
    root = (1 + (k - 1) * target).sqrt() * (2 / 3 / len(outputs)) ** 0.5
    rows = (root[..., None] * columns).reshape(-1, len(deltas)).numpy()
    right = (root * (M * target - outputs)).flatten().numpy()
    rows = np.concatenate([rows, ridge**0.5 * np.eye(len(deltas))])
    right = np.concatenate([right, np.zeros(len(deltas))])
    return np.linalg.lstsq(rows, right)[0]


def assert_same(found, expected, tolerance=1e-10):
    """The default ridge of 1e-12, relative, times the matrix's condition of 8.5."""
    assert np.allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# The weights


@pytest.mark.parametrize("batch_size", [5, 64])
@pytest.mark.parametrize("ridge", [None, 0.0, 0.7])
@pytest.mark.parametrize("k", [1.0, 4.0])
def test_are_those_of_lstsq_on_the_dense_jacobian(tangent, deltas, data, batch_size, ridge, k):
    loss = RescaledSquareLoss(k=k, M=6.0)
    fitted = LeastSquaresWeights(
        deltas, tangent, data, loss=loss, ridge=ridge, batch_size=batch_size, progress=False
    )
    assert_same(fitted.weights(), oracle(tangent, deltas, data, k, 6.0, ridge or 0.0))


def test_the_matrix_is_the_hessian_by_the_weights(tangent, deltas, data):
    """By autograd through RescaledSquareLoss on the dense columns."""
    outputs, columns = dense(tangent, deltas, data)
    loss = RescaledSquareLoss(k=3.0)

    def objective(weights):
        return loss(outputs + columns @ weights, data.tensors[1])

    start = torch.zeros(4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(objective, start)
    gradient = torch.autograd.functional.jacobian(objective, start)
    fitted = LeastSquaresWeights(deltas, tangent, data, loss=loss, batch_size=6)
    assert fitted.matrix.dtype == fitted.vector.dtype == torch.float64
    assert torch.allclose(fitted.matrix, hessian, rtol=1e-12, atol=0)
    assert torch.allclose(fitted.vector, -gradient, rtol=1e-12, atol=0)


def test_mean_squared_error_takes_float_targets(tangent, deltas, data):
    target = torch.randn(23, 3, dtype=torch.float64)
    outputs, columns = dense(tangent, deltas, data)
    expected = np.linalg.lstsq(
        columns.reshape(-1, 4).numpy(), (target - outputs).flatten().numpy()
    )[0]
    regression = TensorDataset(data.tensors[0], target)
    found = LeastSquaresWeights(deltas, tangent, regression, loss=nn.MSELoss()).weights()
    assert_same(found, expected)


def rounded(tangent, deltas, data, dtype):
    """The model and the data in dtype, the deltas in float32 and without meta."""
    coarse = tangent_ops.linearize(copy.deepcopy(tangent.anchor).to(dtype))
    inputs, targets = data.tensors
    plain = [{name: value.float() for name, value in delta.items()} for delta in deltas]
    return plain, coarse, TensorDataset(inputs.to(dtype), targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_fewer_bits_is_near(tangent, deltas, data, dtype):
    """Rounding of weights and outputs, a few times over, times the columns' condition of 2.9."""
    seen = set()

    def loss(logits, targets):
        seen.add(logits.dtype)
        return RescaledSquareLoss()(logits, targets)

    found = LeastSquaresWeights(*rounded(tangent, deltas, data, dtype), loss=loss).weights()
    assert_same(found, oracle(tangent, deltas, data), 10 * torch.finfo(dtype).eps)
    assert seen == {torch.float32}


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_does_not_depend_on_the_callers_grad_mode(tangent, deltas, data, context):
    expected = LeastSquaresWeights(deltas, tangent, data).weights()
    tracked = set()

    def look(module, inputs, output):
        tangent = forward_ad.unpack_dual(output).tangent
        tracked.add(tangent is not None and tangent.requires_grad)

    hook = tangent.anchor.register_forward_hook(look)
    with context():
        fitted = LeastSquaresWeights(deltas, tangent, data)
        assert fitted.weights() == expected
    assert fitted.weights() == expected
    assert tracked == {False}  # no graph is kept
    hook.remove()


def test_a_low_rank_model(data):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    low = tangent_ops.linearize(model, rank=2)
    deltas = random_deltas(low, 3)
    full = []
    for delta in deltas:
        low.load_delta_dict(delta)
        full.append(low.full_delta_dict())
    found = LeastSquaresWeights(deltas, low, data).weights()
    assert_same(found, oracle(low, full, data))
    with pytest.raises(DeltaError, match="is full, expected of rank 2"):
        LeastSquaresWeights(full, low, data)


def test_a_vision_transformer_and_its_tail_on_cached_features():
    """Columns by torch.func.jvp in float64; float32's error of 2e-5, times their condition of 2."""
    tangent = tangent_ops.linearize(vit(), r"^(blocks\.2|head)\.")
    deltas = random_deltas(tangent, 3)
    data = TensorDataset(images(12), torch.arange(12) % 5)
    results = [exact_jvp(tangent.anchor, delta, images(12)) for delta in deltas]
    columns = torch.stack([effect.flatten() for _, effect in results], dim=1)
    residual = 15.0 * F.one_hot(data.tensors[1], 5) - results[0][0]
    expected = np.linalg.lstsq(columns.numpy(), residual.flatten().numpy())[0]
    assert_same(LeastSquaresWeights(deltas, tangent, data).weights(), expected, 4e-5)
    trunk, tail = tangent.split()
    features = tangent_ops.cache_features(trunk, DataLoader(data, batch_size=5))
    assert_same(LeastSquaresWeights(deltas, tail, features).weights(), expected, 4e-5)


# Forgetting


@pytest.mark.parametrize("ridge", [None, 0.0, 0.7])
@pytest.mark.parametrize("keep", [[0, 2, 3], [3, 1], [2]])
def test_keep_is_as_if_there_were_no_others(tangent, deltas, data, ridge, keep):
    kept = [deltas[k] for k in keep]
    found = LeastSquaresWeights(deltas, tangent, data, ridge=ridge).weights(keep=keep)
    assert_same(found, oracle(tangent, kept, data, ridge=ridge or 0.0))
    anew = LeastSquaresWeights(kept, tangent, data, ridge=ridge).weights()
    assert_same(found, np.array(anew), 1e-13)


def test_the_default_ridge_knows_nothing_of_a_forgotten_delta(tangent, deltas, data):
    """A forgotten delta of enormous size would show in a ridge relative to all of them."""
    huge = {name: 1e9 * value for name, value in deltas[3].items()}
    found = LeastSquaresWeights([*deltas[:3], huge], tangent, data).weights(keep=[0, 1, 2])
    assert_same(found, oracle(tangent, deltas[:3], data))


def test_solving_does_not_change_what_is_kept(tangent, deltas, data):
    fitted = LeastSquaresWeights(deltas, tangent, data, ridge=0.5)
    matrix, vector, first = fitted.matrix.clone(), fitted.vector.clone(), fitted.weights()
    fitted.weights(keep=[1, 2])
    assert torch.equal(fitted.matrix, matrix) and torch.equal(fitted.vector, vector)
    assert fitted.weights() == first


# Dependent deltas


@pytest.mark.parametrize("size", [1.0, 10.0])
def test_copies_of_a_delta_share_its_weight(tangent, deltas, data, size):
    copied = {name: size * value for name, value in deltas[1].items()}
    distinct = [deltas[0], copied, *deltas[2:]]
    fitted = LeastSquaresWeights([*distinct, copied], tangent, data)
    found = fitted.weights()
    expected = oracle(tangent, distinct, data)
    assert_same([found[0], found[1] + found[4], *found[2:4]], expected)
    # The ridge is 1e-12 of the mean diagonal entry. The copies' entries are rounded, as sums
    # of some hundred products in an order that differs between processors: 16 units in the last
    # place.
    diagonal = fitted.matrix.diagonal()
    rounding = 16 * torch.finfo(torch.float64).eps * float(diagonal.max())
    assert abs(found[1] - found[4]) <= rounding / (1e-12 * float(diagonal.mean())) * abs(found[1])


def test_collinear_deltas_get_small_weights(tangent, deltas, data):
    """The solution of smallest norm, as lstsq's, as far as rounding against the ridge allows."""
    third = {name: 2 * deltas[0][name] - deltas[1][name] for name in deltas[0]}
    found = LeastSquaresWeights([deltas[0], deltas[1], third], tangent, data).weights()
    assert_same(found, oracle(tangent, [deltas[0], deltas[1], third], data), 1e-3)


@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_collinear_deltas_are_refused_without_ridge(tangent, deltas, data, size):
    fourth = {name: size * (deltas[0][name] + deltas[2][name]) for name in deltas[0]}
    fitted = LeastSquaresWeights([*deltas[:3], fourth], tangent, data, ridge=0.0)
    with pytest.raises(ArgumentError, match=r"weights of deltas \[0, 2, 3\] are not unique"):
        fitted.weights()
    with pytest.raises(ArgumentError, match=r"weights of deltas \[3, 0, 2\] are not unique"):
        fitted.weights(keep=[3, 1, 0, 2])
    assert_same(fitted.weights(keep=[0, 1, 2]), oracle(tangent, deltas[:3], data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collinear_but_for_rounding_is_refused_without_ridge(tangent, deltas, data, dtype):
    """The columns' rounding makes the matrix regular; weights would be fitted to it."""
    plain, coarse, coarse_data = rounded(tangent, deltas[:2], data, dtype)
    third = {name: plain[0][name] + plain[1][name] / 3 for name in plain[0]}
    fitted = LeastSquaresWeights([*plain, third], coarse, coarse_data, ridge=0.0)
    with pytest.raises(ArgumentError, match=r"deltas \[0, 1, 2\] are not unique"):
        fitted.weights()


def test_a_small_delta_among_large_ones_is_not_dependent(tangent, deltas, data):
    small = {name: 1e-8 * value for name, value in deltas[3].items()}
    found = LeastSquaresWeights([*deltas[:3], small], tangent, data, ridge=0.0).weights()
    expected = oracle(tangent, deltas, data)
    assert_same([*found[:3], 1e-8 * found[3]], expected)


def test_a_delta_that_does_nothing(tangent, deltas, data):
    zero = {name: torch.zeros_like(value) for name, value in deltas[0].items()}
    found = LeastSquaresWeights([deltas[0], zero], tangent, data).weights()
    assert found[1] == 0
    assert_same(found[:1], oracle(tangent, deltas[:1], data))
    with pytest.raises(ArgumentError, match=r"deltas \[1\] are not unique"):
        LeastSquaresWeights([deltas[0], zero], tangent, data, ridge=0.0).weights()
    with pytest.raises(ArgumentError, match=r"deltas \[0, 1\] are not unique"):
        LeastSquaresWeights([zero, zero], tangent, data).weights()
    assert LeastSquaresWeights([zero], tangent, data, ridge=1.0).weights() == [0]


# With compose; models, files and loaders


def test_compose_takes_the_weights(tangent, deltas, data):
    expected = oracle(tangent, deltas, data, 4.0, ridge=0.7)
    loss = RescaledSquareLoss(k=4.0)
    found = compose(iter(deltas), "least-squares", tangent=tangent, data=data, loss=loss, ridge=0.7)
    for name, value in found.items():
        terms = [w * delta[name].numpy() for w, delta in zip(expected, deltas, strict=True)]
        assert_same(value.numpy(), np.sum(terms, axis=0))
    assert found.meta == deltas[0].meta


def test_the_tangent_model_is_unchanged(tangent, deltas, data):
    with torch.no_grad():
        for delta in tangent.deltas().values():
            delta.normal_()
    before = {name: value.clone() for name, value in tangent.state_dict().items()}
    own = {name: (id(value), value.requires_grad) for name, value in tangent.named_parameters()}
    tangent.train()
    modes = [module.training for module in tangent.modules()]
    LeastSquaresWeights(deltas, tangent, data)
    assert modes == [module.training for module in tangent.modules()]
    after = tangent.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert own == {n: (id(p), p.requires_grad) for n, p in tangent.named_parameters()}
    assert all(p.grad is None for p in tangent.parameters())


def test_files_are_opened_one_after_the_other(tangent, deltas, data, saved, opened):
    paths = saved(deltas)
    fitted = LeastSquaresWeights(iter(paths), tangent, data, batch_size=12)
    assert opened == paths * 3  # checked, then in two batches
    assert fitted.weights() == LeastSquaresWeights(deltas, tangent, data, batch_size=12).weights()


def test_a_loader_that_shuffles_is_read_once(tangent, deltas, data):
    loader = DataLoader(data, batch_size=5, shuffle=True)
    found = LeastSquaresWeights(deltas, tangent, loader).weights()
    assert_same(found, oracle(tangent, deltas, data))
