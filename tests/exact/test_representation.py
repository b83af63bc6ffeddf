"""How a problem keeps J: what is chosen, computed once, kept on disk or in 16 bits."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from dense import SAMPLES, Dense, flat
from refusals import refused
from small_models import Computes, Mlp, rows
from torch import nn
from torch.utils.data import TensorDataset

from tangent_ops import linearize
from tangent_ops.errors import ArgumentError, NotConvergedWarning, UnsupportedError
from tangent_ops.exact import Influence, Problem, add_samples, fit_exact, forget_samples
from tangent_ops.exact import representation as module
from tangent_ops.exact.extract import Extractor
from tangent_ops.exact.jacobian import Jacobian
from tangent_ops.exact.subset import SubsetInverse

L2 = 0.05


@pytest.fixture(scope="module")
def shared(made: Dense) -> Dense:
    return made


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of samples in each call of an extractor, its own check included."""
    seen: list[int] = []
    call = Extractor.__call__

    def counted(self: Extractor, inputs: torch.Tensor):
        seen.append(len(inputs))
        return call(self, inputs)

    monkeypatch.setattr(Extractor, "__call__", counted)
    return seen


def test_factors_are_computed_once(dense: Dense, extracted: list[int], monkeypatch) -> None:
    problem = dense.problem(L2, representation="factors")
    assert not extracted  # until they are needed
    fit_exact(problem, tol=1e-11)
    checked = min(5, SAMPLES)  # the first batch
    assert sum(extracted) == SAMPLES + checked
    monkeypatch.setattr(Jacobian, "pull_back", None)
    Influence(problem).cross_validate([L2, 1.0])
    fit_exact(problem.with_l2(1.0))
    fit_exact(problem.without([0, 3]), tol=1e-11)
    assert sum(extracted) == SAMPLES + checked
    exact = dense.optimum(L2, keep=[i for i in range(SAMPLES) if i not in (0, 3)])
    assert float((dense.delta - exact).norm()) <= 1e-9 * float(exact.norm())


def test_only_new_samples_are_extracted(dense: Dense, extracted: list[int]) -> None:
    problem = dense.problem(L2, dense.without(9, 10, 11), representation="factors")
    fit_exact(problem, tol=1e-11)
    before = sum(extracted)
    delta, _ = add_samples(problem, dense.kept(9, 10, 11), tol=1e-11)
    assert sum(extracted) == before + 3
    exact = dense.optimum(L2)
    assert float((flat(delta) - exact).norm()) <= 1e-9 * float(exact.norm())


def test_a_certificate_takes_the_factors_in_double(dense: Dense, monkeypatch) -> None:
    """The same bound as by a pass, and no pass, once they are there."""
    problem = dense.problem(L2, representation="factors")
    _, certificate = forget_samples(problem, [1, 4], tol=1e-5, rank=0)
    by_passes = dense.problem(L2, dense.without(1, 4), representation="passes")
    fresh = certificate.verify(by_passes, dense.tangent.delta_dict())
    assert certificate.distance_bound == pytest.approx(fresh.distance_bound, rel=1e-6)
    monkeypatch.setattr(Jacobian, "pull_back", None)
    certificate.verify()


def test_factors_on_disk(dense: Dense, tmp_path: Path) -> None:
    trained = linearize(dense.tangent.anchor, r"^(norm|head)\.")
    options = {"progress": False, "batch_size": 5, "representation": "factors"}
    problem = Problem(trained, dense.data, L2, cache=tmp_path, **options)
    memory = Problem(trained, dense.data, L2, **options)
    found, exact = (Influence(each).left_out() for each in (problem, memory))
    torch.testing.assert_close(found, exact)
    (file,) = tmp_path.iterdir()  # features; the factors' files have no names
    assert file.name == "features.bin"
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines()
              if str(tmp_path) in line and ".factors" in line]  # fmt: skip
    assert mapped
    del problem
    gc.collect()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_in_16_bits(dense: Dense, dtype: torch.dtype) -> None:
    """Gradients of a fit are off by no more than a few units in the last place of that format."""
    single = dense.in_single()
    exact = dense.optimum(L2)
    options = {"representation": "factors"}
    problem = single.problem(L2, factors_dtype=dtype, **options)
    half, whole = problem.system, single.problem(L2, **options).system
    kept = [each.loader.stored.nbytes for each in (half, whole)]  # pyright: ignore
    assert kept[0] < 0.6 * kept[1]
    eps = torch.finfo(dtype).eps
    direction = exact.float()
    right = whole.product(direction, penalty=False)
    off = float((half.product(direction, penalty=False) - right).norm() / right.norm())
    assert eps / 100 < off < 4 * eps
    # A fit reports its distance from the optimum of the given problem, not of the rounded one.
    with pytest.warns(NotConvergedWarning):
        report = fit_exact(problem, tol=1e-5)
    distance = float((single.delta - exact).norm())
    assert eps / 100 * float(exact.norm()) < distance <= report.distance_bound


def test_an_l2_below_the_rounding_is_solved(dense: Dense) -> None:
    """In float32: the preconditioner's decomposition needs a shift."""
    single = dense.in_single()
    problem = single.problem(1e-9, representation="factors")
    found = SubsetInverse([problem.system])(torch.ones_like(single.delta).float())
    assert found.isfinite().all() and found.any()


def test_auto_takes_what_costs_less(dense: Dense, monkeypatch, capsys) -> None:
    tangent, data = dense.tangent, dense.data
    problem = Problem(tangent, data, L2, representation="auto")
    assert problem.representation == "factors" and problem.with_l2(1.0).representation == "factors"
    said = capsys.readouterr().err
    assert said.count("J of 12 samples as layer factors") == 1 and "MB" in said
    monkeypatch.setattr(module, "IN_MEMORY", 1000)
    assert Problem(tangent, data, L2).representation == "passes"
    assert "factors would take" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(module, "PRODUCTS", 2)
    assert Problem(tangent, data, L2).representation == "passes"
    assert "5 outputs cost as many backward passes" in capsys.readouterr().err
    assert Problem(tangent, data, L2, representation="rows").representation == "rows"


def test_auto_takes_passes_for_models_that_mix_samples() -> None:
    mixing = Computes(lambda own, x: own.head(x).tanh().cumsum(0), head=nn.Linear(4, 3))
    data = TensorDataset(rows(6), torch.arange(6) % 3)
    options = {"progress": False, "loss": torch.nn.functional.cross_entropy}
    tangent = linearize(mixing, check=False)
    assert Problem(tangent, data, 1.0, **options).representation == "passes"
    problem = Problem(tangent, data, 1.0, representation="factors", **options)
    with pytest.raises(UnsupportedError, match="mixes samples"):
        fit_exact(problem)


def test_refusals() -> None:
    data = TensorDataset(rows(6), torch.arange(6) % 3)
    tangent = linearize(Mlp())
    refused(ArgumentError, "representation must be one of", Problem, tangent, data, 1.0,
            representation="dense")  # fmt: skip
    refused(ArgumentError, "factors_dtype must be", Problem, tangent, data, 1.0,
            factors_dtype=torch.int8)  # fmt: skip
    problem = Problem(tangent, data, 1.0, representation="factors", progress=False)
    fit_exact(problem)
    tangent.load_state_dict(linearize(Mlp().requires_grad_(False)).state_dict())
    with torch.no_grad():
        tangent.anchor.head.weight.add_(1)  # pyright: ignore
    tangent.load_state_dict(tangent.state_dict())
    refused(ArgumentError, "moved, cast or loaded", fit_exact, problem)
