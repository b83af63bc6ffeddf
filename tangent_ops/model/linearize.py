"""The tangent transformer: a model's first-order Taylor expansion around its weights."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tangent_ops.delta import (
    Delta,
    DeltaMeta,
    check_anchor,
    check_kind,
    check_layout,
    check_values,
    fingerprint,
)
from tangent_ops.errors import (
    ArgumentError,
    NoGradientWarning,
    UnsupportedError,
    ZeroHeadWarning,
)
from tangent_ops.model.check_derivatives import can_check, check_adjoint, described_input
from tangent_ops.model.checkpointing import find_blocks, find_switches, take_flags
from tangent_ops.model.copies import independent_copy
from tangent_ops.model.dual_call import dual_call
from tangent_ops.model.eval_caches import Kept, forget
from tangent_ops.model.features import Trunk, blocks_of, split_model
from tangent_ops.model.low_rank import Basis, delta_dtype, make_bases, product
from tangent_ops.model.trainable import Trainable, choose, pattern_text
from tangent_ops.model.tree import Tree, lookup
from tangent_ops.ops.levels import alone, in_turn, is_compiling


def linearize(
    model: nn.Module,
    trainable: Trainable = None,
    *,
    rank: int | None = None,
    basis: Basis = 0,
    example: Any = None,
    check: bool = True,
) -> LinearizedModel:
    """Expand a model to first order around its present weights w0.

        f_lin(x; Δw) = f(x; w0) + J(x) Δw          J(x) = ∂f(x; w)/∂w at w0

    (Liu, Golatkar, Soatto, "Tangent Transformers for Composition, Privacy and Removal", ICLR
    2024, eq. 2.) Δw starts at zero, so the result first computes what ``model`` does in eval
    mode. The model is copied and left alone; the copy, the *anchor*, is frozen.

    An anchor whose head is all zeros has J = 0 for every parameter below it, so only the head
    would learn. Train a linear probe first (:func:`tangent_ops.fit_head`), linearize there.

    Args:
        model: any module built of operations with a forward derivative.
        trainable: which parameters get a delta. None: all; a regular expression, searched for in
            parameter names (see :func:`last_blocks`); or a function from name to bool.
        rank: None: full deltas. r: every trained parameter that is, with its first dimension
            against all others, a matrix larger than r both ways has Δw = B A. A (r, in) is fixed;
            B (out, r) is the delta: the model stays linear in it, and the loss as convex. Smaller
            ones, biases and norms keep full deltas.
        basis: of low-rank deltas. An int draws orthonormal A from that seed and the parameter's
            name: deltas of one seed belong together, whichever parameters are trained. Or
            name -> A, as from :func:`tangent_ops.gradient_basis`.
        example: an input of the model, or a tuple of its inputs, on which the check below is made
            now rather than at the first call. A timm model's is known.
        check: compare J with the ordinary model's gradients, on one sample. It finds a derivative
            that would get lost (docs/promises/derivatives.md), and costs about two training steps
            of that sample.

    A delta is float32 where its parameter is float16 or bfloat16, which would swallow small
    steps, and is cast in the forward pass. ``.to()``, ``.half()`` and the like leave it so.

    Raises:
        ArgumentError: no parameter matches; ``model`` is no module or linearized already; or rank
            or basis is not as above (see :func:`tangent_ops.model.low_rank.make_bases`).
        UnsupportedError: an operation of the model has no derivative, or a parameter's derivative
            would get lost; the error names it. Or the model cannot be copied or made dual: it is
            lazy or scripted, or a function on an instance belongs to another model.

    Warns:
        NoGradientWarning: a parameter gets no gradient in the ordinary model either.
        ZeroHeadWarning: the classifier is all zeros and something below it is to be trained.
    """
    if isinstance(model, LinearizedModel):
        raise ArgumentError("model is linearized already: pass the original, or model.anchor")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}: expected an nn.Module")
    forget(model)
    anchor = independent_copy(model).eval().requires_grad_(False)
    checkpointing = take_flags(find_switches(anchor))
    names = choose(anchor, trainable)
    zero_head = _warn_about_zero_head(anchor, names)
    chosen = {name: p for name, p in anchor.named_parameters() if name in names}
    if rank is None and basis != 0:
        raise ArgumentError("basis is of low-rank deltas only: pass rank, too")
    everything = dict(anchor.named_parameters(remove_duplicate=False))
    bases = {} if rank is None else make_bases(chosen, rank, basis, everything)
    deltas = {name: nn.Parameter(_zero_delta(p, bases.get(name))) for name, p in chosen.items()}
    fixed = Tree(bases)
    record = _Record(anchor, fixed, pattern_text(trainable))
    tangent = LinearizedModel(anchor, Tree(deltas), fixed, record)
    tangent.grad_checkpointing = checkpointing and bool(find_blocks(anchor))
    tangent._wants_check = tangent._unchecked = check
    tangent._names_idle = not zero_head  # said already, of all below it
    example = described_input(anchor) if example is None else example
    if check and example is not None:
        tangent.check_once(*(example if isinstance(example, tuple) else (example,)))
    return tangent


def last_blocks(model: nn.Module, k: int) -> str:
    """A pattern for ``linearize(model, trainable=...)`` that trains the end of a transformer.

    It matches the last ``k`` of ``model.blocks`` and everything registered after them (final
    norm, head): the paper's TAFT-k.

    Raises:
        ArgumentError: ``k`` is not between 0 and the number of blocks.
        UnsupportedError: the model has no ``blocks``.
    """
    count = len(blocks_of(model))
    if not 0 <= k <= count:
        raise ArgumentError(f"k={k}: expected 0 to {count}, the number of blocks")
    children = [name for name, _ in model.named_children()]
    after = children[children.index("blocks") + 1 :]
    groups = [rf"blocks\.{i}" for i in range(count - k, count)] + [re.escape(n) for n in after]
    return rf"^({'|'.join(groups)})\."


class LinearizedModel(nn.Module):
    """f(x; w0) + J(x) Δw, with Δw as ordinary parameters. Made by :func:`linearize`.

    Both terms come from one forward pass in forward-mode AD: trained parameters are dual tensors
    (w0, Δw), and everything that depends on none of them runs once, without a tangent. The
    anchor stays in eval mode whatever ``train()`` says: dropout and stochastic depth are off,
    batch norm uses its running statistics.

    Any thread may call it. Calls take turns, whichever models they are of: PyTorch has one
    forward-mode level for the whole process. Compiled calls do not: in threads, compile all of them
    or none, and call each once before.

    Attributes:
        anchor: the frozen model at w0.
        grad_checkpointing: whether blocks are repeated in the backward pass; see
            :meth:`set_grad_checkpointing`.
        kept: undoes what a call of the anchor leaves behind.
        rank: of its low-rank deltas; None if all are full.
        trainable: the pattern that chose the trained parameters, as text.
        model_name: the anchor's name.
    """

    def __init__(self, anchor: nn.Module, delta: Tree, basis: Tree, record: _Record):
        super().__init__()
        self.anchor = anchor
        self.delta = delta
        self.basis = basis
        self._record = record
        self.kept = Kept(anchor)
        self._wants_check = self._unchecked = False
        self._names_idle = True
        self._switches = tuple(find_switches(anchor))
        self.grad_checkpointing = False

    def forward(self, *args, **kwargs) -> Any:
        """f(x; w0) + J(x) Δw, shaped as the model's own output.

        Raises:
            UnsupportedError: the output holds something else than tensors, plain values, and
                tuples, lists and dicts of them; an operation has no derivative, or one would get
                lost (at the first call, see :func:`linearize`); or the call cannot nest in the
                forward-mode level that is open: a ``dual_level()`` around it, or one of another
                thread, outside of :class:`tangent_ops.fused_forward_ad`.
        """
        primal, tangent = self.primal_and_tangent(*args, **kwargs)
        return tree_map(lambda p, t: p + t if isinstance(p, Tensor) else p, primal, tangent)

    def primal_and_tangent(self, *args, **kwargs) -> tuple[Any, Any]:
        """The pair f(x; w0), J(x) Δw, each shaped as the model's own output."""
        if not is_compiling() and torch.is_inference_mode_enabled():
            # It switches forward mode off: J(x) Δw would be 0 without a word.
            with torch.inference_mode(False), torch.no_grad():
                return self.primal_and_tangent(*args, **kwargs)
        return in_turn(lambda: self._call(args, kwargs))

    def _call(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        self.check_once(*args, **kwargs)
        directions = self._full_deltas()
        return dual_call(self.anchor, directions, self.kept, args, kwargs, self._blocks())

    def check_once(self, *args, **kwargs) -> None:
        """Make :func:`linearize`'s check with these inputs, if it has not been made.

        Every call does. Call it first where hooks on the anchor must see no other calls.

        Raises:
            UnsupportedError: a derivative gets lost.
        """
        if self._unchecked and not self.sharded and can_check(self.anchor, (args, kwargs)):
            in_turn(lambda: self._check(args, kwargs))

    def _check(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        blocks = find_blocks(self.anchor) if self.grad_checkpointing else []
        idle = check_adjoint(self.anchor, self.delta.names, self.kept, blocks, args, kwargs)
        self._unchecked = idle is None
        if idle and self._names_idle:
            some = ", ".join(idle[:3]) + (f" and {len(idle) - 3} more" if len(idle) > 3 else "")
            warnings.warn(
                f"no gradient in the ordinary model either, on one sample: {some}. Deltas of "
                "parameters that never get one have no effect",
                NoGradientWarning,
                stacklevel=3,
            )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: blocks keep their inputs alone, and run again in backward.

        A block is an element of an nn.Sequential, nn.ModuleList or nn.ModuleDict, of
        ``model.blocks``, say (:func:`tangent_ops.model.checkpointing.find_blocks`). It is repeated as the
        anchor's ordinary forward pass, so a step costs 6 forward passes of the anchor instead of 5,
        and keeps what ordinary checkpointing keeps. It is on from the start if it was on in the
        linearized model (timm's ``set_grad_checkpointing``), and may be switched on by the
        anchor's own. Compiled code and other transforms do without. A block has to get what depends
        on deltas as arguments (in tuples, lists, dicts): what it finds elsewhere, in an attribute
        that another module set, counts as a constant.

        Raises:
            UnsupportedError: the model has no blocks.
        """
        take_flags(self._switches)
        if enable and not find_blocks(self.anchor):
            raise UnsupportedError(
                f"{self.model_name} has no blocks to repeat: no element of an nn.Sequential, "
                "nn.ModuleList or nn.ModuleDict has submodules"
            )
        self.grad_checkpointing = enable
        self._unchecked |= enable and self._wants_check

    def _blocks(self) -> list[nn.Module]:
        """What this call repeats in its backward pass."""
        if is_compiling():
            return []
        if take_flags(self._switches):
            self.set_grad_checkpointing(True)
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return []
        frozen = not any(parameter.requires_grad for parameter in self.anchor.parameters())
        return find_blocks(self.anchor) if frozen else []

    def deltas(self) -> dict[str, nn.Parameter]:
        """The live delta parameters, named as the anchor's: Δw, or its B (out, rank)."""
        return alone(self.delta.tensors)  # not what another thread has put in their place

    def delta_dict(self) -> Delta:
        """A copy of the deltas on their device, with the record of where they belong."""
        tensors = {name: delta.detach().clone() for name, delta in self.deltas().items()}
        meta = DeltaMeta(self.fingerprint, self.model_name, self.trainable)
        if self.rank is not None:
            meta = replace(meta, rank=self.rank, basis=self.basis_fingerprint)
        return Delta(tensors, meta)

    def full_delta_dict(self) -> Delta:
        """A copy of the deltas as Δw = B A, for models of this anchor without ``rank``."""
        tensors = {name: full.detach().clone() for name, full in self._full_deltas().items()}
        return Delta(tensors, DeltaMeta(self.fingerprint, self.model_name, self.trainable))

    def _full_deltas(self) -> dict[str, Tensor]:
        """Δw, shaped as the anchor's parameters, in the deltas' own dtype."""
        deltas: dict[str, Tensor] = {**self.deltas()}
        for name, basis in self.basis.tensors().items():
            deltas[name] = product(deltas[name], basis, lookup(self.anchor, name).shape)
        return deltas

    def load_delta_dict(self, delta: Mapping[str, Tensor]) -> None:
        """Overwrite the deltas in place; nothing changes if ``delta`` does not fit.

        Raises:
            DeltaError: another anchor, rank or basis (where ``delta`` records one), other names
                or shapes, or values that are not finite.
        """
        own = self.deltas()
        meta = getattr(delta, "meta", None)
        check_anchor(meta, self.fingerprint, self.model_name, "the delta")
        check_kind(meta, self.rank, self.basis_fingerprint, "the delta")
        check_values(delta, "the delta")
        check_layout(delta, own, "the delta")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(delta[name])

    def split(self) -> tuple[Trunk, LinearizedModel]:
        """Split in front of the first trained block.

        Returns:
            ``trunk`` maps inputs to tokens, without gradients or tangents; ``tail`` maps tokens
            to what this model returns. The tail shares this model's delta parameters: training
            it trains this model.

        Raises:
            UnsupportedError: a parameter below the blocks is trained, or the model's parts do
                not run one after the other (see :func:`tangent_ops.model.features.split_model`).
        """
        blocks = blocks_of(self.anchor)
        trained = {int(n.split(".")[1]) for n in self.delta.names if n.startswith("blocks.")}
        start = min(trained, default=len(blocks))
        trunk, tail = split_model(self.anchor, start)
        inside = {name for name, _ in tail.named_parameters()}
        below = [name for name in self.delta.names if name not in inside]
        if below:
            raise UnsupportedError(
                f"no part of the model is frozen below its first trained parameter: {below[0]} "
                "is trained. Train without a feature cache."
            )
        trained_part = LinearizedModel(tail, self.delta, self.basis, self._record)
        trained_part._wants_check, trained_part._unchecked = self._wants_check, self._unchecked
        trained_part.grad_checkpointing = self.grad_checkpointing and bool(find_blocks(tail))
        return trunk, trained_part

    def summary(self) -> None:
        """Print trained and frozen parameter counts by group (a block, or a part beside them).

        Of a low-rank delta B counts as trained, and nothing as frozen.
        """
        deltas = self.deltas()
        rows: dict[str, list[int]] = {}
        for name, parameter in self.anchor.named_parameters():
            parts = name.split(".")
            group = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
            row = rows.setdefault(group, [0, 0])
            if name in deltas:
                row[0] += deltas[name].numel()
            else:
                row[1] += parameter.numel()
        rows["total"] = [sum(column) for column in zip(*rows.values(), strict=True)]
        width = max(map(len, rows))
        rank = "" if self.rank is None else f", rank {self.rank}"
        print(f"{self.model_name}, linearized (trainable: {self.trainable}{rank})")
        print(f"{'group':<{width}} {'trained':>14} {'frozen':>14}")
        for group, (trained, frozen) in rows.items():
            print(f"{group:<{width}} {trained:>14,} {frozen:>14,}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the anchor's state, in hexadecimal; computed once, at first use."""
        return self._record.fingerprint

    @property
    def sharded(self) -> bool:
        """Whether the anchor is in parts (:func:`tangent_ops.training.fsdp.shard_anchor`)."""
        return self._record.sharded

    def mark_sharded(self) -> None:
        """Keep the whole anchor's fingerprint; refuse to move, cast or load it from now on."""
        self._record.shard()

    @property
    def rank(self) -> int | None:
        return next((len(basis) for basis in self.basis.tensors().values()), None)

    @property
    def basis_fingerprint(self) -> str | None:
        """SHA-256 of the fixed factors of low-rank deltas, as :attr:`fingerprint`, or None."""
        return self._record.basis_fingerprint

    @property
    def trainable(self) -> str:
        return self._record.trainable

    @property
    def model_name(self) -> str:
        return self._record.model_name

    def train(self, mode: bool = True) -> LinearizedModel:
        super().train(mode)
        self.anchor.eval()
        return self

    def _apply(self, *args, **kwargs):  # .to(), .half(), ...
        self._record.anchor_changes()
        self.kept.put_back()
        result = super()._apply(*args, **kwargs)
        self.kept = Kept(self.anchor)
        return result

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._record.anchor_changes()
        super()._load_from_state_dict(*args, **kwargs)


class _Record:
    """Whose deltas these are. A tail keeps the record of the whole model."""

    def __init__(self, anchor: nn.Module, basis: Tree, trainable: str):
        self.anchor = anchor
        self.basis = basis
        self.trainable = trainable
        self.sharded = False

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.anchor.state_dict())

    @functools.cached_property
    def basis_fingerprint(self) -> str | None:
        return fingerprint(self.basis.tensors()) if self.basis.names else None

    def shard(self) -> None:
        """Take the fingerprints now, for good: later the anchor is in parts."""
        _ = self.fingerprint, self.basis_fingerprint
        self.sharded = True

    def anchor_changes(self) -> None:
        if self.sharded:
            raise UnsupportedError(
                "the anchor is sharded, and stays as it is: move, cast or load the model before "
                "shard_anchor, and leave out `device`"
            )
        for cached in ("fingerprint", "basis_fingerprint"):
            self.__dict__.pop(cached, None)

    @property
    def model_name(self) -> str:
        config = getattr(self.anchor, "pretrained_cfg", None) or {}
        return str(config.get("architecture") or type(self.anchor).__name__)


def _zero_delta(parameter: Tensor, basis: Tensor | None) -> Tensor:
    shape = parameter.shape if basis is None else (len(parameter), len(basis))
    return torch.zeros(shape, dtype=delta_dtype(parameter.dtype), device=parameter.device)


def _warn_about_zero_head(anchor: nn.Module, names: set[str]) -> bool:
    get_classifier = getattr(anchor, "get_classifier", None)
    found: Any = get_classifier() if callable(get_classifier) else None
    heads = found if isinstance(found, tuple) else (found,)  # a distilled model has two
    if any(not isinstance(h, nn.Linear) or torch.count_nonzero(h.weight) for h in heads):
        return False
    own = {id(parameter) for head in heads for parameter in head.parameters()}
    if all(id(anchor.get_parameter(name)) in own for name in names):
        return False
    warnings.warn(
        "the classifier's weight is all zeros, so the derivative by every parameter below it is "
        "zero and only the head can learn: train it first with tangent_ops.fit_head, then "
        "linearize",
        ZeroHeadWarning,
        stacklevel=3,
    )
    return True
