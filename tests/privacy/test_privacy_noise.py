"""Sources of noise: their distribution by scipy's tests, and which of them repeat."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from tangent_ops.errors import ArgumentError
from tangent_ops.privacy.noise import NoiseSource

SOURCES = {"system": {}, "secure": {"secure": True}, "seeded": {"seed": 5}}
N = 100_000


@pytest.fixture(params=SOURCES)
def source(request):
    return NoiseSource(**SOURCES[request.param])


def test_is_gaussian_of_the_standard_deviation_asked_for(source):
    draws = source.normal((N,), 2.5, torch.float64, "cpu").numpy()
    # Each bound fails by chance once in 10^9 runs.
    assert stats.kstest(draws, "norm", args=(0, 2.5)).pvalue > 1e-9
    assert abs(draws.mean()) < 6.2 * 2.5 / math.sqrt(N)
    assert abs(draws.std() / 2.5 - 1) < 6.2 / math.sqrt(2 * N)
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 6.2 / math.sqrt(N)
    # Tails: the largest of N is within what all but one in 10^9 runs have.
    assert 3 < np.abs(draws / 2.5).max() < stats.norm.isf(1e-9 / N / 2)


def test_halves_of_chunks_are_independent(source):
    # Over the chunks of the secure source, whose draws are summed by fours.
    draws = source.normal((4, (1 << 17)), 1.0, torch.float64, "cpu").numpy()
    off = np.corrcoef(draws) - np.eye(4)
    assert np.abs(off).max() < 6.5 / math.sqrt(1 << 17)


def test_two_sources_of_the_system_differ_and_a_seed_repeats():
    def drawn(**options):
        return NoiseSource(**options).normal((8,), 1.0, torch.float64, "cpu")

    assert not torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(secure=True), drawn(secure=True))
    assert torch.equal(drawn(seed=5), drawn(seed=5))
    # torch's own generator takes 32 bits of a seed.
    assert not torch.equal(drawn(seed=5), drawn(seed=5 + 2**32))


def test_a_source_never_repeats_itself(source):
    first, second = (source.normal((8,), 1.0, torch.float64, "cpu") for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_dtype_and_no_noise(source, dtype):
    drawn = source.normal((2, 3), 1.0, dtype, torch.device("cpu"))
    assert drawn.shape == (2, 3)
    assert drawn.dtype == dtype
    assert not source.normal((3,), 0.0, dtype, "cpu").any()
    assert source.normal((), 1.0, dtype, "cpu").shape == ()


def test_words_tell_the_sources_apart():
    words = {name: NoiseSource(**options).words for name, options in SOURCES.items()}
    assert len(set(words.values())) == 3
    assert "5" in words["seeded"]
    assert "no privacy" in words["seeded"]
    assert "os.urandom" in words["secure"]


def test_refuses():
    with pytest.raises(ArgumentError, match="seed must be an integer"):
        NoiseSource(seed=-1)
    with pytest.raises(ArgumentError, match="exclude each other"):
        NoiseSource(seed=1, secure=True)
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(ArgumentError, match="std must be finite"):
            NoiseSource().normal((2,), std, torch.float32, "cpu")
    with pytest.raises(ArgumentError, match="dtype must be floating point"):
        NoiseSource().normal((2,), 1.0, torch.int64, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_is_gaussian_on_cuda(source):
    draws = source.normal((N,), 2.5, torch.float64, "cuda").cpu().numpy()
    assert stats.kstest(draws, "norm", args=(0, 2.5)).pvalue > 1e-9
