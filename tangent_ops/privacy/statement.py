"""`PrivacyStatement`: what a training promises each sample; anybody can recompute it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from typing import Any

from torch import Tensor

from tangent_ops.delta import Delta, DeltaMeta, fingerprint
from tangent_ops.errors import ArgumentError, CertificateError
from tangent_ops.privacy.accounting import (
    Phase,
    check_delta,
    check_phases,
    epsilon,
    failure,
)

ADD_OR_REMOVE = "add or remove one sample"
KEY = "privacy"  # in DeltaMeta.extra
KEY_OF = "privacy.of"  # in DeltaMeta.extra: fingerprint of the delta that the statement is for
TOLERANCE = 1e-3  # of epsilon: another release of the accountant may give so much less
ROUNDING = 1e-9

_CURVE = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
_FORMAT = "tangent-ops privacy statement 1"


@dataclass(frozen=True)
class PrivacyStatement:
    """(epsilon, delta)-differential privacy of what was released, and where it comes from.

    For data sets S, S' that are neighbours in the sense of `adjacency`, and any set of outcomes A:
    P(release of S in A) <= e^epsilon P(release of S' in A) + delta.

    Attributes:
        mechanism: in words.
        phases: what is composed, one after the other, on the same samples.
        clip: C, the bound on one sample's contribution (Euclidean norm), in the mechanism's units;
            of composed statements the largest.
        delta: the delta of `epsilon`.
        epsilon: by PLD.
        epsilon_prv: by Opacus' PRV, at the same delta; inf where it has no answer.
        curve: (delta, epsilon) pairs, by PLD.
        adjacency: which data sets are neighbours.
        sampling: how the samples of a step are chosen, in words.
        noise: where the noise came from, in words.
        assumes: what else must be true.
        accountant: the libraries and their versions.

    Raises:
        ArgumentError: a field is out of range, or of another type.
    """

    mechanism: str
    phases: tuple[Phase, ...]
    clip: float
    delta: float
    epsilon: float
    epsilon_prv: float
    curve: tuple[tuple[float, float], ...]
    adjacency: str
    sampling: str
    noise: str
    assumes: tuple[str, ...]
    accountant: str

    def __post_init__(self) -> None:
        words = {
            name: getattr(self, name)
            for name in ("mechanism", "adjacency", "sampling", "noise", "accountant")
        }
        words |= {f"assumes[{index}]": value for index, value in enumerate(self.assumes)}
        for name, value in words.items():
            if not isinstance(value, str) or not value:
                raise ArgumentError(f"{name} must be in words, got {value!r}")
        check_phases(self.phases)
        if self.adjacency != ADD_OR_REMOVE and any(one.sample_rate < 1 for one in self.phases):
            raise ArgumentError(
                f"adjacency is {self.adjacency!r}: subsampled steps are accounted for "
                f"{ADD_OR_REMOVE!r} only"
            )
        if not (_is_float(self.clip) and 0 < self.clip < math.inf):
            raise ArgumentError(f"clip must be a positive number, got {self.clip!r}")
        check_delta(self.delta)
        for name, value in (("epsilon", self.epsilon), ("epsilon_prv", self.epsilon_prv)):
            _check_epsilon(name, value)
        for delta, value in self.curve:
            check_delta(delta)
            _check_epsilon(f"curve's epsilon at {delta:g}", value)

    def epsilon_at(self, delta: float) -> float:
        """The epsilon of another delta, from the phases, by PLD."""
        return epsilon(self.phases, delta)

    def failure_at(self, epsilon: float) -> float:
        """The delta of another epsilon, from the phases, by PLD."""
        return failure(self.phases, epsilon)

    def then(self, other: PrivacyStatement) -> PrivacyStatement:
        """The statement of this release and then `other`, on the same samples, at this one's delta.

        Raises:
            ArgumentError: `other` is no statement, or has another adjacency.
        """
        if not isinstance(other, PrivacyStatement):
            kind = type(other).__name__
            raise ArgumentError(f"other must be a PrivacyStatement, got a {kind}")
        check_adjacency(self.adjacency, other.adjacency)
        return make_statement(
            mechanism=_joined(self.mechanism, other.mechanism),
            phases=(*self.phases, *other.phases),
            clip=max(self.clip, other.clip),
            delta=self.delta,
            sampling=_joined(self.sampling, other.sampling),
            noise=_joined(self.noise, other.noise),
            assumes=tuple(dict.fromkeys((*self.assumes, *other.assumes))),
            adjacency=self.adjacency,
        )

    def verify(self) -> None:
        """Recompute every epsilon from the phases, and compare.

        This does not check that the training ran these phases; a statement cannot show that.

        Raises:
            CertificateError: a claimed epsilon is lower than what the phases give.
        """
        claims = [("", self.delta, self.epsilon), *(("curve: ", *pair) for pair in self.curve)]
        for where, delta, claimed in claims:
            _check_claim(f"{where}epsilon", claimed, self.epsilon_at(delta), delta)
        if self.epsilon_prv < self.epsilon_at(self.delta) * (
            1 - TOLERANCE
        ):  # rare: PRV is above PLD
            prv = epsilon(self.phases, self.delta, "prv")
            _check_claim("epsilon_prv", self.epsilon_prv, prv, self.delta)

    def to_json(self) -> str:
        """All fields as JSON; an infinite epsilon is the string "inf"."""
        record = {"format": _FORMAT, **asdict(self)}
        for name in ("epsilon", "epsilon_prv"):
            record[name] = written(record[name])
        record["curve"] = [[delta, written(value)] for delta, value in self.curve]
        return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> PrivacyStatement:
        """Read what `to_json` gave.

        Raises:
            ArgumentError: text is something else.
        """
        try:
            record: dict[str, Any] = json.loads(text)
            if record.pop("format", None) != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT!r}")
            if unknown := record.keys() - {field.name for field in fields(cls)}:
                raise ValueError(f"unknown {', '.join(sorted(unknown))}")
            if not isinstance(record["assumes"], list):
                raise ValueError("assumes must be a list")
            return cls(
                **{
                    **record,
                    "phases": tuple(Phase(**phase) for phase in record["phases"]),
                    "epsilon": _read(record["epsilon"]),
                    "epsilon_prv": _read(record["epsilon_prv"]),
                    "curve": tuple((delta, _read(value)) for delta, value in record["curve"]),
                    "assumes": tuple(record["assumes"]),
                }
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArgumentError(f"text is no privacy statement's JSON: {error}") from error

    def __str__(self) -> str:
        return self.describe()

    def describe(self, delta: float | None = None) -> str:
        """The guarantee as text, at `delta` or the statement's own, with all that it rests on."""
        delta = self.delta if delta is None else delta
        bound = self.epsilon if delta == self.delta else self.epsilon_at(delta)
        by = f"{plain(bound)} (PLD)"
        if delta == self.delta:
            by += f", {plain(self.epsilon_prv)} (PRV)"
        rows = [("mechanism", self.mechanism), ("neighbours", self.adjacency)]
        rows += [("sampling", self.sampling)]
        rows += [("steps", _steps(phase)) for phase in self.phases]
        rows += [
            ("clip", f"C = {self.clip:g}: the largest norm of one sample's contribution"),
            ("epsilon", f"{by} at delta = {delta:g}"),
            ("curve", "  ".join(f"{one:>7.3g}" for one, _ in self.curve) + "   delta"),
            ("", "  ".join(f"{plain(one):>7}" for _, one in self.curve) + "   epsilon (PLD)"),
            ("noise", self.noise),
            *(("assumes", assumption) for assumption in self.assumes),
            ("accounting", self.accountant),
        ]
        promise = promised(bound, delta, self.failure_at(0.0), self.adjacency)
        return "\n".join(promise + table(*rows))


def make_statement(
    *,
    mechanism: str,
    phases: tuple[Phase, ...],
    clip: float,
    delta: float,
    sampling: str,
    noise: str,
    assumes: tuple[str, ...],
    adjacency: str = ADD_OR_REMOVE,
) -> PrivacyStatement:
    """Compute the epsilons of phases, and state them.

    Args:
        mechanism: this and the other arguments are as in `PrivacyStatement`.
        phases: as there.
        clip: as there.
        delta: as there.
        sampling: as there.
        noise: as there.
        assumes: as there.
        adjacency: as there.

    Raises:
        ArgumentError: an argument is out of range, or of another type.
    """
    phases = check_phases(phases)
    if isinstance(assumes, str):
        raise ArgumentError(f"assumes must be several strings, got one, {assumes!r}: use a tuple")
    own = epsilon(phases, delta)
    deltas = sorted({*_CURVE, float(delta)}, reverse=True)
    return PrivacyStatement(
        mechanism=mechanism,
        phases=phases,
        clip=float(clip),
        delta=float(delta),
        epsilon=own,
        epsilon_prv=epsilon(phases, delta, "prv"),
        curve=tuple((one, epsilon(phases, one)) for one in deltas),
        adjacency=adjacency,
        sampling=sampling,
        noise=noise,
        assumes=tuple(assumes),
        accountant=(
            f"dp-accounting {version('dp-accounting')} (PLD); opacus {version('opacus')} (PRV)"
        ),
    )


def attach(delta: Delta, statement: PrivacyStatement) -> Delta:
    """The delta with the statement in its meta, which `save_delta` writes.

    The statement is for these values: `statement_of` refuses it with others. What is computed from
    a private delta alone has the same guarantee, and may get the same statement.

    Args:
        delta: with meta.
        statement: replaces one that is in the meta.

    Raises:
        ArgumentError: the delta has no meta, or `statement` is no statement.
    """
    if not isinstance(statement, PrivacyStatement):
        kind = type(statement).__name__
        raise ArgumentError(f"statement must be a PrivacyStatement, got a {kind}")
    meta = getattr(delta, "meta", None)
    if meta is None:
        raise ArgumentError("a delta without meta holds no statement: use Delta(delta, meta)")
    added = {KEY: statement.to_json(), KEY_OF: fingerprint(delta)}
    return Delta(delta, replace(meta, extra=meta.extra | added))


def statement_of(delta: Mapping[str, Tensor] | DeltaMeta) -> PrivacyStatement | None:
    """The statement that a delta or its meta carries, if any; not verified.

    Raises:
        ArgumentError: what it carries is no statement.
        CertificateError: the delta's values changed after the statement was attached.
    """
    meta = delta if isinstance(delta, DeltaMeta) else getattr(delta, "meta", None)
    text = meta.extra.get(KEY) if meta is not None else None
    if meta is None or text is None:
        return None
    if not isinstance(delta, DeltaMeta) and meta.extra.get(KEY_OF) != fingerprint(delta):
        raise CertificateError(
            "the privacy statement is for another delta: these values were changed after it was "
            "attached. If the change used no private data, attach it anew"
        )
    return PrivacyStatement.from_json(text)


def check_adjacency(expected: str, found: str) -> None:
    """Raise ArgumentError unless the adjacencies are the same."""
    if expected != found:
        raise ArgumentError(
            f"statements of different adjacency do not compose: {expected!r} and {found!r}"
        )


def promised(epsilon: float, delta: float, advantage: float, adjacency: str) -> list[str]:
    """What (epsilon, delta)-privacy promises, as lines of text.

    An attacker's advantage, the rate of true positives minus that of false positives, is at most
    the delta of epsilon 0 (Kairouz, Oh, Viswanath, 2015, theorem 2.1).
    """
    if math.isinf(epsilon):
        return [f"No privacy is promised at delta = {delta:g}: epsilon is infinite."]
    secret = "whether one was there" if adjacency == ADD_OR_REMOVE else "which neighbour it was"
    return [
        f"({plain(epsilon)}, {delta:g})-differential privacy for each sample",
        f"  An attacker who sees the result, and knows all other samples, must guess {secret}:",
        f"  at even odds, they are right at most {_percent((1 + advantage) / 2)} of the time.",
    ]


def table(*rows: tuple[str, str]) -> list[str]:
    """Labels and texts as lines; a label that repeats is shown once."""
    before = ["", *(label for label, _ in rows)]
    return [
        f"  {'' if label == before[index] else label:<11} {text}"
        for index, (label, text) in enumerate(rows)
    ]


def plain(epsilon: float) -> str:
    """Four digits, rounded up: a bound never looks smaller than it is."""
    if math.isinf(epsilon) or epsilon == 0:
        return f"{epsilon:g}"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 3)
    return f"{math.ceil(round(epsilon / unit, 6)) * unit:.4g}"


def written(value: float) -> float | str:
    """A number for JSON, which has no infinity: that is the string "inf"."""
    return "inf" if math.isinf(value) else value


def _steps(phase: Phase) -> str:
    rate = f", q = {phase.sample_rate:.4g}" if phase.sample_rate < 1 else ", all samples in each"
    return f"T = {phase.steps:,}, sigma = {phase.noise_multiplier:.4g} (noise / sensitivity){rate}"


def _percent(share: float) -> str:
    return f"{math.ceil(share * 1000) / 10:g}%"


def _check_claim(name: str, claimed: float, shown: float, delta: float) -> None:
    if claimed < shown * (1 - TOLERANCE) - ROUNDING:
        raise CertificateError(
            f"the statement claims {name} = {claimed:.6g} at delta {delta:g}; what its phases "
            f"give is {shown:.6g}"
        )


def _check_epsilon(name: str, value: float) -> None:
    if not (_is_float(value) and value >= 0):
        raise ArgumentError(f"{name} must be a number of 0 or more, or inf, got {value!r}")


def _is_float(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read(value: Any) -> float:
    return math.inf if value == "inf" else value


def _joined(first: str, second: str) -> str:
    return first if first == second else f"{first}; then {second}"
