"""PyTorch's own rules for tangents, where they raise or are wrong once they are differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tangent_ops.errors import UnsupportedError
from tangent_ops.ops.backend import in_forward_ad, may_be_dual, reverse_mode_reaches
from tangent_ops.ops.levels import is_compiling

# Where softmax, logsumexp or a 1-norm is within.
OVERWRITING = frozenset(
    (
        F.cross_entropy,
        F.gumbel_softmax,
        F.log_softmax,
        F.pairwise_distance,
        F.softmin,
        F.triplet_margin_loss,
        Tensor.log_softmax,
        Tensor.logcumsumexp,
        Tensor.logsumexp,
        Tensor.norm,
        torch.dist,
        torch.linalg.matrix_norm,
        torch.linalg.norm,
        torch.linalg.vector_norm,
        torch.log_softmax,
        torch.logcumsumexp,
        torch.logsumexp,
        torch.norm,
        torch.renorm,
        torch.special.log_softmax,
        torch.special.logsumexp,
        torch.special.softmax,
        *filter(None, (getattr(F, "linear_cross_entropy", None),)),  # of newer versions
    )
)
# Whose derivatives use a factorization of an operand, as if that did not depend on it.
FACTORIZING = frozenset(
    (
        Tensor.det,
        Tensor.logdet,
        Tensor.orgqr,
        Tensor.slogdet,
        torch.det,
        torch.linalg.det,
        torch.linalg.householder_product,
        torch.linalg.slogdet,
        torch.linalg.solve,
        torch.linalg.solve_ex,
        torch.linalg.tensorsolve,
        torch.logdet,
        torch.orgqr,
        torch.slogdet,
    )
)


class _NothingInPlace(TorchDispatchMode):
    """Does nothing; where any such mode is on, PyTorch's rules write no intermediate twice."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def out_of_place(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """PyTorch's ``function``, whose tangent can be differentiated by its inputs.

    In a dual level, also under ``torch.func.grad`` in it, the rules of softmax, logsumexp and the
    1-norm overwrite what the backward pass by a tracked primal needs, and that raises ("modified by
    an inplace operation").
    """
    if in_forward_ad() and not is_compiling() and _tracked(args, kwargs):
        with _NothingInPlace():
            return function(*args, **kwargs)
    return function(*args, **kwargs)


def _tracked(*values: Any) -> bool:
    return reverse_mode_reaches(*(x for x in tree_leaves(values) if isinstance(x, Tensor)))


def may_be_differentiated(input: Tensor, *others: Tensor | None) -> bool:
    """Whether an operand has a tangent, and derivatives of the result's by ``input`` may be wanted.

    Reverse over forward or forward over forward: a rule that takes for constants what was computed
    of the input (mean and deviation, a factorization) is then wrong, without a word.
    """
    if not any(map(may_be_dual, (input, *others))):
        return False
    if is_compiling() or reverse_mode_reaches(input):
        return True
    derivatives = _derivatives()
    in_dual_level = TransformType.Jvp not in derivatives
    return len(derivatives) + in_dual_level > 1


def refuse_factorizations(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raise where one of ``FACTORIZING`` would be differentiated wrongly.

    Raises:
        UnsupportedError: derivatives of its tangent by the operands may be wanted.
    """
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if is_compiling() or not any(map(may_be_dual, operands)):
        return
    inside = TransformType.Jvp in _derivatives()[1:]
    # Forward mode around torch.func.grad is right: then no tensor itself requires gradients.
    if inside or any(map(_requires_grad_outside, operands)):
        raise UnsupportedError(
            f"{function.__name__}: PyTorch takes its factorization for a constant in derivatives "
            "of the tangent, which would be wrong. Use torch.linalg.lu_factor and lu_solve, or "
            "give it no input that requires gradients."
        )


def are_nested() -> bool:
    """Whether more than one ``torch.func`` transform that differentiates is active."""
    return len(_derivatives()) > 1


def _derivatives() -> list[TransformType]:
    """The ``torch.func`` transforms that differentiate, from the outside in."""
    keys = [transform.key() for transform in get_interpreter_stack() or ()]
    return [key for key in keys if key in (TransformType.Grad, TransformType.Jvp)]


def _requires_grad_outside(tensor: Tensor) -> bool:
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor.requires_grad
