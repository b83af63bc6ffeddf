"""`compose(how=...)`: the head in closed form against dense float64 solutions, and the dispatch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dense import CLASSES, SAMPLES, Dense, flat, make
from refusals import refused
from small_models import Mlp, vit
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tangent_ops import compose, core_basis, linearize, save_delta, statistics
from tangent_ops.composition.ridge import TRIED
from tangent_ops.composition.statistics import TangentStatistics
from tangent_ops.composition.statistics_file import save_statistics
from tangent_ops.delta import Delta
from tangent_ops.errors import ArgumentError, DeltaError, StatisticsError, UnsupportedError
from tangent_ops.exact import Problem, compose_lossless, fit_exact, head_statistics

L2, BITS = 0.05, 46
PARTS = [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9, 10, 11]]  # unequal, and of unequal classes
HEAD = ("head.weight", "head.bias")


@pytest.fixture(scope="module")
def deltas(made: Dense) -> list[Delta]:
    """The shards' optima."""
    found = []
    for part in PARTS:
        made.tangent.zero_()
        fit_exact(made.problem(L2, made.kept(*part)), tol=1e-12)
        found.append(made.tangent.delta_dict())
    for delta in made.tangent.deltas().values():
        nn.init.normal_(delta)  # the model's own deltas must not count
    return found


def sums(dense: Dense, at: Delta | None = None) -> list[TangentStatistics]:
    """Each shard's statistics of the head, with residuals at a delta or the anchor."""
    return [
        head_statistics(dense.tangent, dense.kept(*part), at, fraction_bits=BITS, progress=False)
        for part in PARTS
    ]


def head_columns(dense: Dense) -> Tensor:
    own = dense.tangent.deltas()
    return torch.cat([torch.full((d.numel(),), n in HEAD) for n, d in own.items()])


def best_head(dense: Dense, block: Tensor, l2: float) -> Tensor:
    """argmin over h of Σ_i (1/NC) ‖y - f - J b - J_head h‖² + l2/2 ‖h‖², for a delta (P,)."""
    own = head_columns(dense)
    moved = dense.jacobian[:, :, ~own] @ block[~own]
    right = (dense.targets - dense.anchor - moved).flatten() / (SAMPLES * CLASSES) ** 0.5
    rows = dense.jacobian[:, :, own].flatten(0, 1) / (SAMPLES * CLASSES) ** 0.5
    penalty = (l2 / 2) ** 0.5 * torch.eye(rows.shape[1], dtype=torch.float64)
    stacked = torch.cat([rows, penalty]), torch.cat([right, right.new_zeros(len(penalty))])
    return torch.linalg.lstsq(*stacked).solution


def assert_composed(dense: Dense, found: Delta, mean: Delta, head: Tensor) -> None:
    own = head_columns(dense)
    assert torch.equal(flat(found)[~own], flat(mean)[~own])
    assert float((flat(found)[own] - head).norm()) <= 1e-10 * float(head.norm())
    assert found.meta == mean.meta
    assert list(found) == list(mean)


def test_with_a_round_the_head_is_the_optimum_given_the_mean_of_the_blocks(
    made: Dense, deltas: list[Delta], tmp_path
) -> None:
    mean = compose(deltas)
    own = sums(made, mean)
    expected = best_head(made, flat(mean), 0.3)
    assert_composed(made, compose(deltas, how="head", statistics=own, l2=0.3), mean, expected)
    paths = [tmp_path / f"{index}.safetensors" for index in range(len(own))]
    for path, one in zip(paths, own, strict=True):
        save_statistics(one, path)
    assert_composed(made, compose(deltas, how="head", statistics=paths, l2=0.3), mean, expected)


def test_without_a_round_the_head_is_the_optimum_at_the_anchor(
    made: Dense, deltas: list[Delta]
) -> None:
    found = compose(deltas, how="head", statistics=sums(made), l2=L2)
    expected = best_head(made, torch.zeros_like(made.delta), L2)
    assert_composed(made, found, compose(deltas), expected)


def test_l2_is_of_the_least_generalised_cross_validation(made: Dense, deltas: list[Delta]) -> None:
    mean = compose(deltas)
    found = compose(deltas, how="head", statistics=sums(made, mean))
    own, n = head_columns(made), SAMPLES * CLASSES
    rows = made.jacobian[:, :, own].flatten(0, 1)
    moved = torch.einsum("ncp,p->nc", made.jacobian[:, :, ~own], flat(mean)[~own])
    right = (made.targets - made.anchor - moved).flatten()

    def score(l2: float) -> float:
        hat = rows @ torch.linalg.solve(
            rows.T @ rows + l2 * n / 2 * torch.eye(rows.shape[1], dtype=torch.float64), rows.T
        )
        return float((right - hat @ right).square().mean() / (1 - hat.trace() / n) ** 2)

    assert found.l2 == min(TRIED, key=score)


@pytest.mark.parametrize("pattern", [r"^(norm|head)\.", r"^(blocks\.0\.attn|head\.weight)"])
def test_a_sample_has_the_same_bits_in_any_company(made: Dense, pattern: str) -> None:
    tangent = linearize(made.tangent.anchor, pattern)
    delta = tangent.delta_dict()
    for value in delta.values():
        value.normal_(std=0.1)
    whole = head_statistics(tangent, made.data, delta, fraction_bits=BITS, progress=False)
    total = None
    for part in PARTS:
        own = head_statistics(
            tangent, made.kept(*part), delta, fraction_bits=BITS, batch_size=2, progress=False
        )
        total = own if total is None else total + own
    assert total == whole
    assert whole.meta.head == tuple(name for name in delta if name.startswith("head."))


def test_head_refuses_statistics_that_are_not_of_these_deltas(
    made: Dense, deltas: list[Delta]
) -> None:
    mean = compose(deltas)
    at_mean, at_own = sums(made, mean), sums(made, deltas[0])
    head = partial(compose, deltas, how="head", l2=L2)
    refused(StatisticsError, "neither at the mean of these deltas nor", head, statistics=at_own)
    mixed = [*sums(made)[:1], *at_mean[1:]]
    refused(StatisticsError, "has another origin", head, statistics=mixed)
    refused(ArgumentError, "2 statistics for 3 deltas", head, statistics=at_mean[:2])
    others = [*deltas[:2], {name: 2 * value for name, value in deltas[2].items()}]
    with pytest.raises(StatisticsError, match="residuals neither at the mean"):
        compose(others, how="head", statistics=at_mean, l2=L2)
    other = make()
    with torch.no_grad():
        other.tangent.anchor.head.bias.add_(1)  # pyright: ignore
    foreign = linearize(other.tangent.anchor)
    with pytest.raises(DeltaError, match="another anchor"):
        head_statistics(foreign, made.data, mean, progress=False)
    elsewhere = head_statistics(foreign, made.data, foreign.delta_dict(), progress=False)
    with pytest.raises(DeltaError, match=r"for statistics\[2\], belongs to another anchor"):
        head(statistics=[*at_mean[:2], elsewhere])
    only = linearize(made.tangent.anchor, r"^head\.")
    with pytest.raises(ArgumentError, match="must be of exact"):
        head(statistics=[*at_mean[:2], statistics(only, made.data, progress=False)])


def test_a_model_without_a_linear_head_of_full_deltas_is_refused(made: Dense) -> None:
    model = nn.Sequential(Mlp(), nn.Tanh())
    for tangent, inputs in (
        (linearize(model), torch.randn(4, 4)),
        (linearize(vit().double(), r"^blocks\.2\."), made.data.tensors[0]),
        (linearize(vit().double(), r"^(norm|head)\.", rank=2), made.data.tensors[0]),
    ):
        data = TensorDataset(inputs, torch.zeros(len(inputs), dtype=torch.int64))
        call = partial(head_statistics, tangent, data, tangent.delta_dict(), progress=False)
        with pytest.raises(UnsupportedError, match="one linear layer that is trained with a full"):
            call()


def test_lossless_and_least_squares_are_their_functions(made: Dense, deltas: list[Delta]) -> None:
    curvatures = [made.problem(L2, made.kept(*part)).curvature() for part in PARTS]
    found = compose(deltas, how="lossless", curvatures=curvatures, tol=1e-10)
    exact = made.optimum(L2)
    assert float((flat(found) - exact).norm()) <= 1e-7 * float(exact.norm())
    few = compose(deltas, how="lossless", curvatures=curvatures, tol=1e-10, max_rounds=4)
    assert few.rounds == 4
    alone = compose_lossless(deltas, curvatures, 1e-10, max_rounds=4, progress=False)
    assert all(torch.equal(few[name], alone[name]) for name in few)
    given = {"tangent": made.tangent, "data": made.data}
    old, new = (
        compose(deltas, "least-squares", **given),
        compose(deltas, how="least-squares", **given),
    )
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert not torch.equal(flat(old), flat(compose(deltas)))


def test_statistics_are_summed_and_solved(made: Dense, tmp_path) -> None:
    model = vit(depth=1, embed_dim=12, num_heads=2).double()
    tangent = linearize(model, core=core_basis(model, made.data, 2))
    tangent_sums = [
        statistics(tangent, made.kept(*p), fraction_bits=BITS, remembered=True, progress=False)
        for p in PARTS
    ]
    fit_exact(Problem(tangent, made.data, 0.3, progress=False), 1e-13)
    expected = flat(tangent.delta_dict())
    path = tmp_path / "statistics"
    save_statistics(tangent_sums[1], path)
    found = compose([tangent_sums[0], path, tangent_sums[2]], how="statistics", l2=0.3)
    tangent.load_delta_dict(found)
    assert float((flat(tangent.delta_dict()) - expected).norm()) <= 1e-9 * float(expected.norm())
    chosen = compose(iter(tangent_sums), how="statistics")
    assert chosen.l2 == (tangent_sums[0] + tangent_sums[1] + tangent_sums[2]).choose().delta.l2


def test_named_ways_take_their_own_arguments(made: Dense, deltas: list[Delta], tmp_path) -> None:
    named = compose(deltas, how="mean")
    assert all(torch.equal(named[n], v) for n, v in compose(deltas).items())
    named = compose(deltas, [1, 2, 3], how="weights")
    assert all(torch.equal(named[n], v) for n, v in compose(deltas, [1, 2, 3]).items())
    call = partial(compose, deltas)
    refused(ArgumentError, "how must be", call, how="soup")
    refused(ArgumentError, "how='weights' needs weights", call, how="weights")
    refused(ArgumentError, "how='head' needs statistics", call, how="head")
    refused(ArgumentError, "how='lossless' needs curvatures", call, how="lossless")
    refused(ArgumentError, "how='least-squares' needs data", call, how="least-squares", tangent=1)
    refused(ArgumentError, "weights is not an argument of how='mean'", call, [1, 2, 3], how="mean")
    refused(ArgumentError, "pass how='head' or 'statistics'", call, l2=1.0)
    refused(ArgumentError, "pass how='lossless'", call, [1, 2, 3], tol=1.0)
    refused(ArgumentError, "bogus is not an argument of how='mean': leave it out", call, bogus=1)
    refused(ArgumentError, "expected TangentStatistics or the path", call, how="statistics")
    refused(ArgumentError, "deltas is empty", compose, [], how="statistics")
    save_delta(deltas[0], tmp_path / "delta")
    with pytest.raises(StatisticsError):
        compose([tmp_path / "delta"], how="statistics")
