"""`Privacy`: the guarantee of a private training, and how it draws samples and noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tangent_ops.data import check_choice, check_integer, check_positive
from tangent_ops.errors import ArgumentError
from tangent_ops.privacy.accounting import Phase, noise_multiplier_for
from tangent_ops.privacy.noise import NoiseSource
from tangent_ops.privacy.statement import PrivacyStatement


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The guarantee of a private training, and how it draws samples and noise.

    `fit_private`, `fit_last_iterate` and `perturb_output` take one. Two data sets are neighbours if
    one is the other with one sample added.

    Attributes:
        delta: the δ of (ε, δ), below one over the number of samples N.
        target_epsilon: ε; the noise is the smallest that reaches it. Give either this or
            noise_multiplier.
        noise_multiplier: σ, the noise's standard deviation over the sensitivity; positive.
        max_grad_norm: C, the norm that each sample's gradient is clipped to, over all deltas
            together. Only for `fit_private`, which needs it.
        expected_batch_size: E, from 1 to N: in each step every sample is drawn with probability
            E/N. Only for `fit_private`.
        steps: T; only for `fit_private` and `fit_last_iterate`.
        start: only for `fit_private`. "zero": the deltas are zeros. A statement: they were trained
            on these samples with that guarantee, which is added to the new one. "public": they
            depend on no private sample.
        seed: makes runs repeatable bit for bit, for tests: whoever knows it can subtract the noise.
            None: the operating system draws one, which is not kept.
        secure_mode: takes the random bits of noise and sampling from the operating system instead
            of a generator (in a group of processes, sampling uses a generator), and protects the
            noise from attacks on its rounding; see `NoiseSource`.
        public_preprocessing: states that the data set's preprocessing was fitted to public data.

    Raises:
        ArgumentError: a value out of range; not exactly one of target_epsilon and noise_multiplier;
            seed and secure_mode together.
    """

    delta: float
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    max_grad_norm: float | None = None
    expected_batch_size: float = 256
    steps: int = 100
    start: PrivacyStatement | Literal["zero", "public"] = "zero"
    seed: int | None = None
    secure_mode: bool = False
    public_preprocessing: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise ArgumentError(f"delta must be between 0 and 1, got {self.delta}")
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ArgumentError("give exactly one of target_epsilon and noise_multiplier")
        for name in ("target_epsilon", "noise_multiplier", "max_grad_norm"):
            if (value := getattr(self, name)) is not None:
                check_positive(**{name: value})
        check_positive(expected_batch_size=self.expected_batch_size)
        check_integer("steps", self.steps, 1)
        if not isinstance(self.start, PrivacyStatement):
            check_choice("start", self.start, ("zero", "public"), " or a PrivacyStatement")
        self.noise_source()  # checks seed and secure_mode

    def noise_source(self) -> NoiseSource:
        """A new source of the noise."""
        return NoiseSource(self.seed, self.secure_mode)

    def check_failure(self, samples: int) -> None:
        """Raise ArgumentError unless delta is below 1/N."""
        if self.delta >= 1 / samples:
            raise ArgumentError(
                f"delta={self.delta:g} is not below 1/N = {1 / samples:.3g}: publishing one of the "
                f"{samples} samples at random would satisfy it. 1e-5 or 1/(10 N) are usual"
            )

    def multiplier(self, sample_rate: float, steps: int, before: Sequence[Phase] = ()) -> float:
        """σ as given, or the smallest that reaches target_epsilon after `steps` steps."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.target_epsilon is not None
        return noise_multiplier_for(
            self.target_epsilon, self.delta, sample_rate=sample_rate, steps=steps, before=before
        )

    @property
    def assumes(self) -> tuple[str, ...]:
        """What these options assume, in words, for a statement."""
        said = []
        if self.start == "public":
            said.append(
                "the deltas that it started from depend on no private sample (stated by the user)"
            )
        if self.public_preprocessing:
            said.append(
                "all that the preprocessing learned is from public data (stated by the user)"
            )
        if self.seed is not None:
            said.append("the seed stays secret")
        return tuple(said)

    def after_start(self, statement: PrivacyStatement) -> PrivacyStatement:
        """The statement of a training, after that of the deltas that it started from."""
        if isinstance(self.start, PrivacyStatement):  # its assumptions must hold, too
            return dataclasses.replace(self.start, delta=self.delta).then(statement)
        return statement

    def check_unused(self, function: str, *names: str) -> None:
        """Raise ArgumentError if a field that the function does not use is not its default."""
        for field in dataclasses.fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                raise ArgumentError(
                    f"{function} does not use {field.name}: leave it out of Privacy"
                )
