"""`ShardRecipe`: how each shard is trained. With anchor and samples it determines a delta."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from torch import nn

from tangent_ops.data import check_choice, check_integer, check_positive, did_you_mean
from tangent_ops.errors import ArgumentError
from tangent_ops.model.linearize import last_blocks
from tangent_ops.training.options import Recipe

if TYPE_CHECKING:
    from tangent_ops.privacy import Privacy

_GRADIENT = ("epochs", "lr", "optimizer", "schedule", "seed", "accumulate", "batch_size")
_EXACT, _STATISTICS = ("tol",), ("core",)
_REPLACED = ("epochs", "batch_size", "seed", "accumulate")  # by the options of a private fit
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


@dataclass(frozen=True)
class ShardRecipe(Recipe):
    """A `Recipe` of plain values, which the plan stores, with further options for shards.

    Attributes:
        loss: "rsl", the rescaled square loss, which is quadratic; or "cross-entropy".
        amp: bfloat16 autocast.
        blocks: number of last blocks that are trained, with norm and head; None for all parameters.
        rank: of low-rank deltas, as in `linearize`; None for full deltas.
        basis: seed of the low-rank deltas' fixed factors.
        method: "gradient", by `fit`; "exact", by `fit_exact`, which needs l2 > 0; or "statistics",
            by `statistics`: a shard has no delta, but the sums that determine one for any l2.
        core: of the method "statistics", size of the cores, as in `core_basis`.
        tol: of the method "exact", as in `fit_exact`.
        augment: timm's training transforms in place of those for inference. They are drawn anew in
            every epoch, so nothing is cached.
        grad_checkpointing: compute blocks again in the backward pass, to save memory.
        threads: number of threads of a shard's process; the last bits of sums depend on it.
        cache: run the frozen blocks below the first trained one once per sample.
        dp_epsilon: ε of a private fit by `fit_private`; None for none. `fit_private` uses loss, lr,
            l2, optimizer and schedule; epochs, batch_size and seed are not used.
        dp_delta: δ of a private fit, below one over the number of samples in the largest shard.
        dp_clip: max_grad_norm of a private fit.
        dp_batch_size: expected_batch_size of a private fit; a smaller shard uses all its samples
            in each step.
        dp_steps: steps of a private fit.

    Raises:
        ArgumentError: a value is out of range, or two exclude each other.
    """

    loss: Literal["rsl", "cross-entropy"] = "rsl"
    amp: bool = False
    blocks: int | None = 1
    rank: int | None = None
    basis: int = 0
    method: Literal["gradient", "exact", "statistics"] = "gradient"
    core: int = 8
    tol: float = 1e-3
    augment: bool = False
    grad_checkpointing: bool = False
    threads: int = 1
    cache: bool = True
    dp_epsilon: float | None = None
    dp_delta: float | None = None
    dp_clip: float = 1.0
    dp_batch_size: float = 256.0
    dp_steps: int = 100

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            self._check_type(name, hint)
        super().__post_init__()
        for name in ("threads", "dp_steps"):
            check_integer(name, getattr(self, name), 1)
        check_integer("basis", self.basis, 0)
        if self.blocks is not None:
            check_integer("blocks", self.blocks, 0)
        if self.rank is not None:
            check_integer("rank", self.rank, 1)
        check_positive(dp_clip=self.dp_clip, dp_batch_size=self.dp_batch_size)
        if not 0 < self.tol < 1:
            raise ArgumentError(f"tol must be between 0 and 1, got {self.tol}")
        check_integer("core", self.core, 1)
        if self.method == "exact":
            self._check_exact()
        if self.method == "statistics":
            self._check_statistics()
        if self.dp_epsilon is not None:
            self._check_private()
        elif self.dp_delta is not None:
            raise ArgumentError("dp_delta is for a private fit: give dp_epsilon, too")

    @property
    def cached(self) -> bool:
        """Whether the frozen blocks run once per sample."""
        return self.cache and not self.augment and self.blocks is not None

    def privacy(self, samples: int) -> Privacy | None:
        """`Privacy` of a shard with this many samples; None for a fit that is not private."""
        if self.dp_epsilon is None or self.dp_delta is None:
            return None
        from tangent_ops.privacy import Privacy

        return Privacy(
            delta=self.dp_delta,
            target_epsilon=self.dp_epsilon,
            max_grad_norm=self.dp_clip,
            expected_batch_size=min(self.dp_batch_size, samples),
            steps=self.dp_steps,
        )

    def trainable(self, model: nn.Module) -> str | None:
        """The pattern of the trained parameters, for `linearize`."""
        return None if self.blocks is None else last_blocks(model, self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Names and plain values, for `from_dict`."""
        values = dataclasses.asdict(self)
        if self.method != "statistics":
            del values["core"]  # not used: it must not change the hashes of jobs
        return values

    @property
    def applied(self) -> dict[str, Any]:
        """The options that the method reads, without those that are off."""
        private = self.dp_epsilon is not None
        unused = {
            "gradient": (*_EXACT, *_STATISTICS),
            "exact": (*_GRADIENT, *_STATISTICS),
            "statistics": (*_GRADIENT, *_EXACT, "l2"),
        }[self.method]
        unused += _REPLACED if private else ()
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in unused
            and (private or not name.startswith("dp_"))
            and (name != "basis" or self.rank is not None)
            and value is not None
            and value is not False
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ShardRecipe:
        """The recipe that `to_dict` was called on.

        Raises:
            ArgumentError: an unknown name, or as in `ShardRecipe`.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ArgumentError(f"a recipe has no {name!r}{did_you_mean(str(name), known)}")
        return cls(**values)

    def _check_type(self, name: str, hint: Any) -> None:
        """Only plain values of one form: they are written into the plan, and hashed."""
        value, kinds = getattr(self, name), get_args(hint) or (hint,)
        if value is None and type(None) in kinds:
            return
        if isinstance(kinds[0], str):
            check_choice(name, value, kinds)
        elif kinds[0] is float and type(value) is int:  # 1 and 1.0 are one recipe
            object.__setattr__(self, name, float(value))
        elif type(value) is not kinds[0]:
            raise ArgumentError(f"{name} must be {_NAMES[kinds[0]]}, got {value!r}")

    def _check_exact(self) -> None:
        if self.l2 <= 0:
            raise ArgumentError(f"method 'exact' needs l2 > 0, got {self.l2}: try l2=1e-3")
        for name in ("augment", "amp"):
            if getattr(self, name):
                raise ArgumentError(f"{name} is for method 'gradient': it has no unique optimum")
        if self.dp_epsilon is not None:
            raise ArgumentError("dp_epsilon is for method 'gradient': fit_private is DP-SGD")

    def _check_statistics(self) -> None:
        if self.loss != "rsl":
            raise ArgumentError(f"loss is {self.loss!r}: method 'statistics' is for 'rsl'")
        if self.l2 != 0:
            raise ArgumentError(
                f"l2 is {self.l2:g}, but statistics are the same for every l2: choose it when the "
                "run is composed (compose --l2)"
            )
        if self.blocks == 0:
            raise ArgumentError("blocks is 0: method 'statistics' needs a block with cores")
        for name in ("augment", "amp", "rank", "dp_epsilon"):
            if getattr(self, name):
                raise ArgumentError(f"{name} is not for method 'statistics': leave it out")

    def _check_private(self) -> None:
        check_positive(dp_epsilon=self.dp_epsilon)  # pyright: ignore[reportArgumentType]
        if self.dp_delta is None or not 0 < self.dp_delta < 1:
            raise ArgumentError(
                f"dp_epsilon needs dp_delta between 0 and 1, got {self.dp_delta}: pass less than "
                "one over the number of samples in the largest shard, for example 1e-5"
            )
        for name in ("augment", "amp"):
            if getattr(self, name):
                raise ArgumentError(f"{name} is not for private fits: leave it out")
        if self.accumulate != 1:
            raise ArgumentError(
                "accumulate is not for private fits: their batches are drawn at random, and are "
                "processed in parts anyway"
            )
