"""Removal and addition of samples, and what certificates claim, against dense optima."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dense import Dense, flat, make
from torch import Tensor
from torch.utils.data import TensorDataset

from tangent_ops import linearize
from tangent_ops.delta import Delta
from tangent_ops.errors import (
    ArgumentError,
    CertificateError,
    NotConvergedWarning,
    UnsupportedError,
)
from tangent_ops.exact import (
    Certificate,
    certify,
    fit_exact,
    forget_samples,
    forget_without_data,
    noised,
)

L2 = 0.05
STAY, GO = list(range(9)), [9, 10, 11]


@pytest.fixture
def dense(shared: Dense) -> Dense:
    """The problem with its deltas at the optimum of all samples."""
    shared.set(shared.optimum(L2))
    return shared


def size(vector: Tensor) -> float:
    return float(vector.norm())


def test_forgetting_is_retraining(dense: Dense) -> None:
    retrained = dense.optimum(L2, keep=STAY)
    assert size(dense.delta - retrained) > 0.1 * size(retrained)
    delta, certificate = forget_samples(dense.problem(L2), GO, tol=1e-11)
    assert size(flat(delta) - retrained) <= 1e-10 * size(retrained)
    assert torch.equal(flat(delta), dense.delta)
    assert size(flat(delta) - retrained) <= certificate.distance_bound + 1e-12 * size(retrained)
    assert certificate.samples == len(STAY) and certificate.l2 == L2


@pytest.mark.parametrize("loose", [1, 3, 6])
def test_the_bounds_hold_when_the_solve_is_loose(dense: Dense, loose: int) -> None:
    with pytest.warns(NotConvergedWarning):
        delta, certificate = forget_samples(dense.problem(L2), GO, max_iterations=loose, rank=0)
    off = flat(delta) - dense.optimum(L2, keep=STAY)
    assert 1e-6 < size(off) <= certificate.distance_bound
    inputs = dense.data.tensors[0][GO]
    bounds = certificate.logit_bound(dense.tangent, inputs)
    moved = (dense.rows(inputs) @ off).abs()
    assert bounds.shape == moved.shape
    assert (moved <= bounds).all() and (moved > 0).all()
    lengths = dense.rows(inputs).norm(dim=2)
    torch.testing.assert_close(bounds, certificate.distance_bound * lengths)


def test_certificates_of_other_convex_losses(dense: Dense) -> None:
    problem = dense.problem(L2, loss=F.cross_entropy)
    forget_samples(problem, GO, tol=1e-10)
    best = dense.delta
    dense.set(best + 1e-3)
    certificate = certify(problem.without(GO))
    assert size(dense.delta - best) <= certificate.distance_bound
    assert certificate.verify().distance_bound == pytest.approx(certificate.distance_bound)


def test_a_certificate_is_verified(dense: Dense) -> None:
    retain = dense.without(*GO)
    delta, certificate = forget_samples(dense.problem(L2), GO, tol=1e-3, rank=0)
    assert repr(certificate).startswith("Certificate(‖Δ - Δ*‖ <= ")
    fresh = certificate.verify()
    assert fresh == replace(certificate, **_numbers(fresh))
    assert fresh.distance_bound == pytest.approx(certificate.distance_bound, rel=1e-9)

    dense.set(torch.zeros_like(dense.delta))  # it is about the delta, wherever the model is
    read = Certificate.from_json(certificate.to_json())
    assert read == certificate
    assert json.loads(certificate.to_json())["distance_bound"] == certificate.distance_bound
    with pytest.raises(ArgumentError, match="verify needs problem and delta"):
        read.verify()
    read.verify(dense.problem(L2, retain), delta)

    def refused(match: str, changed=read, l2=L2, data=retain, found=delta, **options) -> None:
        with pytest.raises(CertificateError, match=match):
            changed.verify(dense.problem(l2, data, **options), found)

    refused("claims a distance", replace(read, distance_bound=read.distance_bound / 2))
    refused("another delta", found=Delta({n: 1.001 * v for n, v in delta.items()}))
    refused("another data", data=dense.without(0, 1, 2))
    refused("another samples", data=dense.without(0, 1))
    refused("another loss", loss=F.cross_entropy)
    refused("another l2", l2=2 * L2)
    refused("another anchor", replace(read, anchor="0" * 64))
    with pytest.raises(ArgumentError, match="no certificate's JSON"):
        Certificate.from_json("{}")


def test_a_certificate_on_cached_features() -> None:
    last = make(trainable=r"^(norm|head)\.")
    exact = last.optimum(L2, keep=STAY)
    retain = last.without(*GO)
    delta, certificate = forget_samples(last.problem(L2, cache=True), GO, tol=1e-10)
    assert size(flat(delta) - exact) <= 1e-9 * size(exact)
    certificate.verify()
    read = Certificate.from_json(certificate.to_json())
    read.verify(last.problem(L2, retain, cache=True), delta)
    with pytest.raises(CertificateError, match="another method"):
        read.verify(last.problem(L2, retain), delta)


def _numbers(certificate: Certificate) -> dict[str, float]:
    return {name: getattr(certificate, name) for name in ("distance_bound", "gradient_norm")}


def test_a_certificate_of_a_float32_model_is_in_float64(dense: Dense) -> None:
    """The bound still falls where float32 gradients consist of rounding errors."""
    single = dense.in_single()
    inputs, labels = single.data.tensors
    rounded = TensorDataset(inputs.double(), labels)
    double = replace(single, tangent=linearize(copy.deepcopy(single.tangent.anchor).double()))
    problem = double.problem(L2, rounded)
    fit_exact(problem, tol=1e-12)
    single.set(double.delta.float())
    certificate = certify(single.problem(L2))
    found = single.delta.double()
    assert size(found - double.delta) <= certificate.distance_bound
    # Where no digit of the float32 gradient is left.
    _, gradient, _ = problem.passes.gradient(found)
    assert certificate.gradient_norm == pytest.approx(size(gradient), rel=1e-6)
    _, noisy, _ = single.problem(L2).passes.gradient(single.delta)
    assert size(noisy) != pytest.approx(size(gradient), rel=1e-2)


@pytest.mark.parametrize("inexact", [0.0, 1e-4])
def test_forgetting_without_the_retained_data(dense: Dense, inexact: float) -> None:
    dense.set(dense.optimum(L2) + inexact)
    start = certify(dense.problem(L2))
    shards = [dense.problem(L2, dense.kept(*part)).curvature() for part in (range(4), range(4, 9))]

    def retained(direction):
        a, b = (shard(direction) for shard in shards)
        return {name: a[name] + b[name] for name in a}

    delta, certificate = forget_without_data(
        dense.problem(L2, dense.kept(*GO)), retained, 9, start, tol=1e-11
    )
    exact = dense.optimum(L2, keep=STAY)
    off = size(flat(delta) - exact)
    assert off <= certificate.distance_bound
    assert off <= (1e-9 if inexact == 0 else 1e-2) * size(exact)
    assert certificate.data is None and "retained" in certificate.assumes[-1]
    assert torch.equal(dense.delta, flat(delta))
    with pytest.raises(ArgumentError, match="made without the data"):
        certificate.verify()


def test_forgetting_without_data_asks_for_the_right_start(dense: Dense) -> None:
    start = certify(dense.problem(L2))
    shard = dense.problem(L2, dense.without(*GO)).curvature()
    before = dense.delta

    def refused(match: str, error=ArgumentError, samples=9, start=start, **options) -> None:
        with pytest.raises(error, match=match):
            forgotten = dense.problem(L2, dense.kept(*GO), **options)
            forget_without_data(forgotten, shard, samples, start)
        assert torch.equal(dense.delta, before)

    refused("another samples: 12, here it is 11", samples=8)
    refused("another l2", start=replace(start, l2=1.0))
    refused("quadratic", error=UnsupportedError, loss=F.cross_entropy)
    dense.set(before + 1)
    before = dense.delta
    refused("another delta")


def test_noise_hides_the_distance(dense: Dense) -> None:
    delta, certificate = forget_samples(dense.problem(L2), GO, tol=0.1)
    loud = noised(delta, certificate, epsilon=0.5, failure=1e-5)
    expected = certificate.distance_bound * math.sqrt(2 * math.log(1.25e5)) / 0.5
    assert loud.sigma == pytest.approx(expected)
    noise = flat(loud.delta) - flat(delta)
    # The standard error of a standard deviation is σ / sqrt(2 P).
    assert float(noise.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * len(noise)))
    again = noised(delta, certificate, epsilon=0.5, failure=1e-5)
    assert not torch.equal(flat(again.delta), flat(loud.delta))
    for options, match in (
        ({"epsilon": 2.0, "failure": 1e-5}, "epsilon must be above 0 and at most 1"),
        ({"epsilon": 0.5, "failure": 0.0}, "failure must be between 0 and 1"),
    ):
        with pytest.raises(ArgumentError, match=match):
            noised(delta, certificate, **options)
    with pytest.raises(ArgumentError, match="another delta"):
        noised(loud.delta, certificate, epsilon=0.5, failure=1e-5)
