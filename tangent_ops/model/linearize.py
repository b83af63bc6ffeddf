"""Makes a tangent model: the first-order Taylor expansion of a model around its weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tangent_ops.errors import ArgumentError, ZeroHeadWarning
from tangent_ops.family import after_blocks, block_names, heads_of, parts_pattern
from tangent_ops.model.checkpointing import find_blocks, find_switches, take_flags
from tangent_ops.model.copies import independent_copy
from tangent_ops.model.core_basis import CoreBasis
from tangent_ops.model.described_input import described_input
from tangent_ops.model.eval_caches import clear_caches
from tangent_ops.model.linearized import LinearizedModel, Record
from tangent_ops.model.low_rank import Basis, Core, delta_dtype, make_bases, make_cores
from tangent_ops.model.sharded import refuse_sharded
from tangent_ops.model.trainable import Trainable, choose, pattern_text
from tangent_ops.model.tree import Tree


def linearize(
    model: nn.Module,
    trainable: Trainable = None,
    *,
    rank: int | None = None,
    basis: Basis = 0,
    core: Core | None = None,
    example: Any = None,
    check: bool = True,
) -> LinearizedModel:
    """Expand a model to first order around its present weights w0.

        f_lin(x; Δw) = f(x; w0) + J(x) Δw          J(x) = ∂f(x; w)/∂w at w0

    (Liu, Golatkar, Soatto, "Tangent Transformers for Composition, Privacy and Removal", ICLR
    2024, eq. 2.) Δw starts at zero, so the result first computes what ``model`` does in eval
    mode. The model is copied and does not change; the copy, the *anchor*, is frozen.

    An anchor whose head is all zeros has J = 0 for every parameter below it, so only the head
    would learn. Train a linear probe first (:func:`tangent_ops.fit_head`), then linearize.

    Args:
        model: any module built of operations with a forward derivative, such as a timm or Hugging
            Face model. Called with its own arguments, the result returns its own kind of output.
        trainable: which parameters get a delta. None: all; a regular expression, searched for in
            parameter names (see :func:`last_blocks`); or a function from name to bool.
        rank: None: full deltas. An integer r: each trained parameter, seen as a matrix (first
            dimension, all others) larger than r in both, has Δw = B A. A (r, in) is fixed and
            B (out, r) is the delta: the model is linear in B, and a convex loss stays convex.
            Smaller parameters, biases and norms keep full deltas. Linear layers and convolutions
            compute with the factors (compiled code multiplies them out).
        basis: basis of low-rank deltas. An int seeds random orthonormal A, which depend on the
            parameter's name but not on which parameters are trained: deltas of one seed compose.
            Or name -> A, as :func:`tangent_ops.gradient_basis` returns it. With ``core`` a seed.
        core: None, or the fixed sides of Δw = B C A, of which C (r_out, r_in) is the delta: name ->
            (B, A), B (out, r_out) with orthonormal columns and A (r_in, in) with orthonormal rows;
            or r, or (r_out, r_in), for random ones. Other trained parameters keep full deltas.
            :func:`tangent_ops.core_basis` computes sides, and then chooses ``trainable``, too.
        example: an input of the model, or a tuple of its inputs, to run the check below now instead
            of at the first call. timm's and Hugging Face's models describe their own input.
        check: compare J with the ordinary model's gradients on one sample. The check finds
            derivatives that would get lost (docs/promises/derivatives.md), and costs about two
            training steps on that sample.

    The delta of a float16 or bfloat16 parameter is float32, since 16 bits would lose small steps;
    the forward pass casts it. ``.to()``, ``.half()`` and the like do not change that.

    Raises:
        ArgumentError: no parameter matches; ``model`` is no module or linearized already; or rank,
            basis or core is not as above (see :mod:`tangent_ops.model.low_rank`).
        UnsupportedError: an operation of the model has no derivative, or a parameter's derivative
            would get lost (the error names it); the model is lazy, scripted or under FSDP; or a
            function on an instance uses another model.

    Warns:
        NoGradientWarning: a parameter gets no gradient in the ordinary model either.
        ZeroHeadWarning: the classifier is all zeros and something below it is to be trained.
    """
    if isinstance(model, LinearizedModel):
        raise ArgumentError("model is linearized already: pass the original, or model.anchor")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}: expected an nn.Module")
    refuse_sharded(model)
    if trainable is None and isinstance(core, CoreBasis):
        trainable = core.trainable
    clear_caches(model)
    anchor = independent_copy(model).eval().requires_grad_(False)
    checkpointing = take_flags(find_switches(anchor))
    names = choose(anchor, trainable)
    zero_head = _warn_about_zero_head(anchor, names)
    chosen = {name: p for name, p in anchor.named_parameters() if name in names}
    if rank is None and core is None and basis != 0:
        raise ArgumentError("basis is for low-rank deltas only: pass rank as well")
    if rank is not None and core is not None:
        raise ArgumentError("rank and core exclude each other: pass one of them")
    everything = dict(anchor.named_parameters(remove_duplicate=False))
    bases, lefts = {}, {}
    if rank is not None:
        bases = make_bases(chosen, rank, basis, everything)
    elif core is not None:
        bases, lefts = make_cores(chosen, core, basis, everything)
    deltas = {
        name: nn.Parameter(_zero_delta(p, bases.get(name), lefts.get(name)))
        for name, p in chosen.items()
    }
    right, left = Tree(bases), Tree(lefts)
    record = Record(anchor, right, left, pattern_text(trainable))
    if isinstance(core, CoreBasis):
        record.basis_remembers = core.remembers
    tangent = LinearizedModel(anchor, Tree(deltas), right, left, record)
    tangent.grad_checkpointing = checkpointing and bool(find_blocks(anchor))
    tangent._wants_check = tangent._unchecked = check
    tangent._names_idle = not zero_head  # the warning named them already
    example = described_input(anchor) if example is None else example
    if check and example is not None:
        tangent.check_once(*(example if isinstance(example, tuple) else (example,)))
    return tangent


def last_blocks(model: nn.Module, k: int) -> str:
    """A pattern for ``linearize(model, trainable=...)`` that trains the end of a transformer.

    It matches the last ``k`` blocks (:class:`tangent_ops.Family`; of a Swin its stages) and
    everything registered after them (final norm, head): the paper's TAFT-k.

    Raises:
        ArgumentError: ``k`` is not between 0 and the number of blocks.
        UnsupportedError: the model has no blocks, or several lists of them.
    """
    names = list(block_names(model))
    count = len(names)
    if not 0 <= k <= count:
        raise ArgumentError(f"k={k}: expected 0 to {count}, the number of blocks")
    return parts_pattern([*names[count - k :], *after_blocks(model)])


def _zero_delta(parameter: Tensor, right: Tensor | None, left: Tensor | None) -> Tensor:
    shape = parameter.shape
    if right is not None:
        shape = (len(parameter) if left is None else left.shape[1], len(right))
    return torch.zeros(shape, dtype=delta_dtype(parameter.dtype), device=parameter.device)


def _warn_about_zero_head(anchor: nn.Module, names: set[str]) -> bool:
    heads = heads_of(anchor)  # a distilled model has two
    if not heads or any(torch.count_nonzero(head.weight) for head in heads):
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
