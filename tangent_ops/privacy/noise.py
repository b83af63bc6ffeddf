"""`NoiseSource`: Gaussian noise from a generator, or from the operating system."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from tangent_ops.data import check_integer, check_not_negative
from tangent_ops.errors import ArgumentError
from tangent_ops.files import to_json

_CHUNK = 1 << 18  # entries whose random bytes are held at once
_TERMS = 4  # Gaussian draws summed for an entry of secure noise


class NoiseSource:
    """Draws independent Gaussian noise for a private mechanism.

    A generator's whole output follows from its seed: whoever guesses the seed can subtract the
    noise. So noise on the CPU is numpy's, with a seed of 128 bits, as torch's generator there uses
    only 32 bits of its seed. Noise on CUDA devices is torch's (Philox), with a seed of 63 bits.

    All draws are made in float64, scaled, and rounded once to the requested dtype. The gaps between
    floating-point numbers can reveal the mean (Mironov, "On significance of the least significant
    bits for differential privacy", CCS 2012). ``secure`` prevents this in practice, but not
    provably: a sum of four draws hides which doubles each of them can be (Holohan, Braghin,
    "Secure random sampling in differential privacy", ESORICS 2021).

    Args:
        seed: makes the noise repeatable, for tests: no privacy against anyone who knows it. None
            for a seed that the operating system draws and that is not kept.
        secure: takes every bit from ``os.urandom``, on the CPU, instead of a generator; about ten
            times slower.

    Attributes:
        words: where the noise comes from, in words, for a privacy statement.

    Raises:
        ArgumentError: seed is not an integer of 0 or more; seed and secure are both given.
    """

    def __init__(self, seed: int | None = None, secure: bool = False) -> None:
        if seed is not None:
            check_integer("seed", seed, 0)
            if secure:
                raise ArgumentError(
                    "seed and secure exclude each other: secure noise cannot be drawn again"
                )
        self._seed = seed
        self._secure = secure
        self._numpy = np.random.Generator(np.random.PCG64(secrets.randbits(128)))
        if seed is not None:
            self._numpy = np.random.Generator(np.random.PCG64(seed))
        self._cuda: dict[torch.device, torch.Generator] = {}

    @property
    def words(self) -> str:
        if self._secure:
            return f"os.urandom, {_TERMS} Gaussian draws summed to one (Holohan, Braghin 2021)"
        if self._seed is not None:
            return f"a generator with the seed {self._seed}: no privacy if others know it"
        return (
            "a generator seeded by the operating system, in floating point: no protection against "
            "attacks on the generator or on rounding"
        )

    def normal(
        self, shape: Sequence[int], std: float, dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        """Noise of mean 0, independent in every entry.

        Args:
            shape: of the result.
            std: standard deviation, not negative; 0 gives zeros.
            dtype: floating point.
            device: where the result goes.

        Raises:
            ArgumentError: std is negative or not finite; dtype is not floating point.
        """
        check_not_negative(std=std)
        if not dtype.is_floating_point:
            raise ArgumentError(f"dtype must be floating point, got {dtype}")
        where = torch.device(device)
        if where.type == "cuda" and not self._secure:
            generator = self._generator(where)
            drawn = torch.randn(
                tuple(shape), generator=generator, dtype=torch.float64, device=where
            )
            return drawn.mul_(std).to(dtype)
        size = math.prod(shape)
        entries = _from_the_system(size) if self._secure else self._numpy.standard_normal(size)
        return torch.from_numpy(entries).mul_(std).to(dtype).reshape(tuple(shape)).to(where)

    def state(self) -> str:
        """The generators' state: whoever has it can draw the same noise and subtract it."""
        cuda = {str(where): g.get_state().tolist() for where, g in self._cuda.items()}
        return to_json({"numpy": self._numpy.bit_generator.state, "cuda": cuda})

    def restore(self, state: str) -> None:
        """Continue from a state that `state` returned."""
        record = json.loads(state)
        self._numpy.bit_generator.state = record["numpy"]
        for where, values in record["cuda"].items():
            device = torch.device(where)
            self._generator(device).set_state(torch.tensor(values, dtype=torch.uint8))

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._cuda:
            seed = secrets.randbits(63) if self._seed is None else self._seed
            self._cuda[device] = torch.Generator(device).manual_seed(seed)
        return self._cuda[device]


def _from_the_system(size: int) -> np.ndarray:
    """Standard normal entries, float64."""
    entries = np.empty(size)
    for start in range(0, size, _CHUNK):
        part = entries[start : start + _CHUNK]
        bits = np.frombuffer(os.urandom(8 * _TERMS * len(part)), dtype=np.uint64)
        # k + 1/2 is exact for k of 52 bits, and the quantile's argument is never 0 or 1. Another
        # bit gives the sign.
        draws = ndtri(((bits >> np.uint64(12)) + 0.5) * 2.0**-53)
        draws = np.where(bits & np.uint64(1), draws, -draws)
        part[:] = draws.reshape(_TERMS, -1).sum(axis=0) / math.sqrt(_TERMS)
    return entries
