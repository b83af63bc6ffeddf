"""Statistics of models: the fit of `fit_exact`, and the same bits for a sample in any company."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Mlp, generator, images, vit
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from tangent_ops import LinearizedModel, core_basis, fit_exact, linearize, statistics
from tangent_ops.composition.ridge import Ridge
from tangent_ops.errors import ArgumentError, StatisticsError, UnsupportedError
from tangent_ops.exact import Problem, predictive_covariance
from tangent_ops.exact.collect import feature_rows
from tangent_ops.losses import RescaledSquareLoss

L2 = 0.3
BITS = 44


def images_and_classes(count: int, seed: int = 1) -> TensorDataset:
    inputs = images(count, seed=seed).double()
    return TensorDataset(inputs, torch.randint(5, (count,), generator=generator(seed)))


PUBLIC, DATA = images_and_classes(6, seed=7), images_and_classes(14)


def model_with_core(vectors: bool = False, **options) -> LinearizedModel:
    model = vit(**options).double()
    return linearize(model, core=core_basis(model, PUBLIC, (3, 2), vectors=vectors))


@pytest.fixture(scope="module")
def tangent() -> LinearizedModel:
    return model_with_core()


def fitted(tangent: LinearizedModel, data: Dataset, **options) -> dict[str, Tensor]:
    tangent.zero_()
    fit_exact(Problem(tangent, data, L2, progress=False, **options), 1e-13)
    return dict(tangent.delta_dict())


def assert_near(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert found.keys() == exact.keys()
    off = sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5
    assert off <= 1e-10 * sum(float(value.square().sum()) for value in exact.values()) ** 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: model_with_core(),
        lambda: model_with_core(vectors=True),
        lambda: model_with_core(class_token=False, global_pool="avg"),
        lambda: model_with_core(qk_norm=True, qkv_bias=False),
        lambda: linearize(vit().double(), r"^head\."),
        lambda: linearize(vit().double(), r"^head\.weight$"),
        lambda: linearize(vit().double(), r"^(norm|head)\.", rank=2),
        lambda: linearize(vit().double(), r"^blocks\.2\.attn\.", core=2),
    ],
    ids=["core", "vectors", "pooled", "qk", "head", "weight", "rank", "no-head"],
)
def test_the_solution_is_the_exact_fit_in_the_same_parameters(make) -> None:
    tangent = make()
    found = statistics(tangent, DATA, fraction_bits=BITS, progress=False).solve(L2)
    assert_near(found, fitted(tangent, DATA))
    tangent.load_delta_dict(found)  # the origin fits


def test_the_square_loss_of_any_targets(tangent: LinearizedModel) -> None:
    inputs = DATA.tensors[0]
    data = TensorDataset(inputs, torch.randn(len(inputs), 5, generator=generator(3)).double())
    found = statistics(tangent, data, loss=nn.MSELoss(), fraction_bits=BITS, progress=False)
    assert found.counts.tolist() == [14]
    assert_near(found.solve(L2), fitted(tangent, data, loss=nn.MSELoss()))


def test_class_weights_are_those_of_the_samples_own_losses(tangent: LinearizedModel) -> None:
    weights = [1.0, 2.0, 3.0, 1.0, 1.0]
    found = statistics(
        tangent, DATA, class_weights=weights, fraction_bits=BITS, progress=False
    ).solve(L2)
    repeated = [i for i, (_, c) in enumerate(DATA) for _ in range(int(weights[int(c)]))]
    # A sample of weight 2 counts as two; the mean is still over N.
    copies: Dataset = Subset(DATA, repeated)
    tangent.zero_()
    fit_exact(Problem(tangent, copies, L2 * len(DATA) / len(repeated), progress=False), 1e-13)
    assert_near(found, dict(tangent.delta_dict()))


@settings(deadline=None, max_examples=6)
@given(draws=st.randoms(use_true_random=False), batch=st.integers(1, 9))
def test_a_sample_has_the_same_bits_in_any_company(
    tangent: LinearizedModel, draws: random.Random, batch: int
) -> None:
    order = list(range(len(DATA)))
    draws.shuffle(order)
    cut = draws.randrange(1, len(order))

    def of(indices: list[int], size: int):
        return statistics(tangent, Subset(DATA, indices), batch_size=size, progress=False)

    whole, first, second = of(sorted(order), 64), of(order[:cut], batch), of(order[cut:], 2)
    assert first + second == whole
    assert whole - second == first
    for l2 in (0.1, 1.0):
        solved, exact = (whole - second).solve(l2), first.solve(l2)
        assert all(torch.equal(solved[name], exact[name]) for name in exact)


def test_a_loaders_own_batches_and_a_split_tail_of_float32() -> None:
    model = vit()
    data = TensorDataset(DATA.tensors[0].float(), DATA.tensors[1])
    public = TensorDataset(PUBLIC.tensors[0].float(), PUBLIC.tensors[1])
    tangent = linearize(model, core=core_basis(model, public, 3))
    whole = statistics(tangent, data, progress=False)
    loader = DataLoader(data, batch_size=5, shuffle=True)
    assert statistics(tangent, loader, progress=False) == whole
    trunk, tail = tangent.split()
    tokens = torch.cat([trunk(one) for one in data.tensors[0].split(1)])
    assert statistics(tail, TensorDataset(tokens, data.tensors[1]), progress=False) == whole


def test_leave_one_out_and_covariance_from_features(tangent: LinearizedModel) -> None:
    whole = statistics(tangent, DATA, fraction_bits=BITS, progress=False)
    rows, residuals = feature_rows(tangent, DATA, progress=False)
    ridge = Ridge(whole)
    left = ridge.leave_one_out(rows, residuals, L2)
    others = Subset(DATA, [i for i in range(len(DATA)) if i != 3])
    tangent.load_delta_dict(fitted(tangent, others))
    with torch.no_grad():
        logits = tangent(DATA.tensors[0][3:4])[0]
    target = 15.0 * nn.functional.one_hot(DATA.tensors[1][3], 5).double()
    torch.testing.assert_close(left[3], target - logits, rtol=1e-9, atol=1e-9)
    fitted(tangent, DATA)
    exact = predictive_covariance(
        Problem(tangent, DATA, L2, progress=False), DATA.tensors[0][:2], 1.3 * 2 / 5, tol=1e-13
    )
    torch.testing.assert_close(ridge.covariance(rows, L2, 1.3)[:2], exact, rtol=1e-8, atol=1e-10)


def test_samples_that_the_basis_remembers_are_refused() -> None:
    tangent = model_with_core()
    mixed = Subset(ConcatDataset([DATA, PUBLIC]), [0, 5, 16])
    with pytest.raises(ArgumentError, match=r"data\[2\] is among the data .* remembered=True"):
        statistics(tangent, mixed, progress=False)
    assert len(statistics(tangent, mixed, remembered=True, progress=False)) == 3


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (nn.CrossEntropyLoss(), "CrossEntropyLoss"),
        (RescaledSquareLoss(k=2), "k=2"),
        (RescaledSquareLoss(reduction="sum"), "reduction='sum'"),
        (nn.MSELoss(reduction="sum"), "MSELoss"),
    ],
)
def test_other_losses_are_refused_by_name(
    tangent: LinearizedModel, loss: nn.Module, named: str
) -> None:
    with pytest.raises(UnsupportedError, match=rf"loss is .*{named}.*use fit_exact"):
        statistics(tangent, DATA, loss=loss, progress=False)


@pytest.mark.parametrize("where", [0, 13])
def test_inputs_that_are_not_finite_are_refused(tangent: LinearizedModel, where: int) -> None:
    inputs = DATA.tensors[0].clone()
    inputs[where, 0, 0, 0] = torch.nan
    with pytest.raises((ArgumentError, StatisticsError), match="not finite: check the"):
        statistics(tangent, TensorDataset(inputs, DATA.tensors[1]), progress=False)


def test_wrong_arguments_are_refused(tangent: LinearizedModel) -> None:
    for options, message in (
        ({"classes": ["a", "b"]}, "classes has 2 entries, the model 5 outputs"),
        ({"class_weights": [1.0]}, "class_weights has 1 entries"),
        ({"class_weights": [1.0, 1.0, 0.0, 1.0, 1.0]}, r"class_weights\[2\] must be positive"),
        ({"fraction_bits": 0}, "fraction_bits must be an integer of at least 1"),
    ):
        with pytest.raises(ArgumentError, match=message):
            statistics(tangent, DATA, progress=False, **options)
    floats = TensorDataset(DATA.tensors[0], torch.randn(14, 5).double())
    with pytest.raises(ArgumentError, match="class_weights are for targets that are classes"):
        statistics(tangent, floats, loss=nn.MSELoss(), class_weights=[1.0] * 5, progress=False)
    with pytest.raises(ArgumentError, match=r"targets have shape \(14,\)"):
        statistics(tangent, DATA, loss=nn.MSELoss(), progress=False)
    with pytest.raises(ArgumentError, match=r"Linearize with core=core_basis"):
        wide = linearize(vit(embed_dim=96).double(), r"^blocks\.2\.")
        statistics(wide, DATA, progress=False)
    with pytest.raises(ArgumentError, match="tangent must be a LinearizedModel"):
        statistics(Mlp(), DATA)  # type: ignore[arg-type]
