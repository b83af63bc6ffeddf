"""Classifies operations into kernel families: by what they are nested in, then by their own name.

The time of a matrix product inside attention is attention's, so the outermost enclosing operation
that is attention, a norm or an activation decides first. Otherwise the innermost name that a
pattern matches decides. In each table the first pattern that matches wins. Names are searched in
lower case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ATTENTION = "attention"
GEMM = "GEMM"
NORM = "norm"
ACTIVATION = "activation"
ELEMENTWISE = "elementwise"
COPY = "copy"
OTHER = "other"

# In the order in which they are shown.
MEANING = {
    ATTENTION: "attention, its matrix products and softmax included",
    GEMM: "matrix products and convolutions outside attention",
    NORM: "layer norm and its like",
    ACTIVATION: "GELU and its like",
    ELEMENTWISE: "other elementwise arithmetic, reductions",
    COPY: "copies, fills, concatenation",
    OTHER: "everything else: loss, views, the profiled program's own bookkeeping",
}
FAMILIES = tuple(MEANING)

_ACTIVATIONS = r"gelu|silu|relu|elu|glu|mish|hardswish|hardsigmoid|sigmoid|tanh|softplus"
_NORMS = r"(layer|batch|group|instance|rms|weight)_?norm"
_SOFTMAX = r"(?<!log)(?<!log_)soft_?max"  # a loss has a log_softmax
_OURS = r"^_(jvp|jvpofplain|vjp|secondvjp)(backward)?$"  # our autograd functions of attention


def _table(*rows: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), family) for pattern, family in rows)


# Everything nested in an operation that matches belongs to its family.
_SCOPES = _table(
    (rf"scaled_dot_product|attention|{_OURS}|{_SOFTMAX}", ATTENTION),
    (_NORMS, NORM),
    (_ACTIVATIONS, ACTIVATION),
)

_ARITHMETIC = (
    "add|sub|rsub|mul|div|neg|exp|exp2|log|log2|sqrt|rsqrt|pow|abs|erf|erfc|sin|cos|square|"
    "reciprocal|addcmul|addcdiv|lerp|clamp|clamp_min|clamp_max|where|masked_fill|sum|mean|var|"
    "var_mean|amax|amin|max|min|maximum|minimum|eq|ne|lt|le|gt|ge|all|any|isneginf|logical_not|"
    "logical_and|logical_or|bernoulli|native_dropout"
)
_OPERATIONS = _table(
    (
        r"(^|::)(mm|bmm|addmm|baddbmm|addbmm|matmul|mv|addmv|dot|einsum|linear|_linear)"
        r"(backward\d*)?_?$|conv|_linear(_|$)|gemm",
        GEMM,
    ),
    (
        r"copy|clone|contiguous|(^|::)(to|cat|stack|fill|zero|repeat|gather|index|index_select|"
        r"index_put|embedding|constant_pad_nd|pad|roll|flip)(backward\d*)?_?$|memcpy|memset",
        COPY,
    ),
    (rf"(^|::)_?({_ARITHMETIC})(backward\d*)?_?$", ELEMENTWISE),
)

# Kernels of CUDA: PyTorch's, the vendor's libraries', Inductor's and our own.
_KERNELS = _table(
    (r"log_?softmax|nll_?loss|cross_?entropy", OTHER),
    (
        rf"attention|flash|fmha|sdpa|{_SOFTMAX}|grad_(query|key_value|mask)_kernel",
        ATTENTION,
    ),
    (rf"{_NORMS}|gammabeta|rowwisemoments|(^|[:_])bn_(fw|bw)", NORM),
    (
        r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|conv|wgrad|dgrad|implicit_|^(ampere|volta|"
        r"turing|hopper|maxwell)_|^triton_(mm|bmm|tem)|dot_kernel",
        GEMM,
    ),
    (_ACTIVATIONS, ACTIVATION),
    (r"copy|memcpy|memset|fill|catarray|transpose|index_|gather|scatter|embedding", COPY),
    (r"elementwise|vectorized|reduce|functor|foreach|multi_tensor|^triton_", ELEMENTWISE),
)

_ENGINE = "autograd::engine::evaluate_function: "


def family(operations: Sequence[str], kernel: str | None = None) -> str:
    """The family of an operation, or of a kernel that it launched.

    Args:
        operations: names from the outermost operation to the one itself. A backward pass belongs
            to the operations of its forward pass: put their names first. Empty for a kernel whose
            launching operation is unknown.
        kernel: name of the kernel; None to classify the operation.

    Returns:
        One of :data:`FAMILIES`.
    """
    names = [name.removeprefix(_ENGINE).lower() for name in operations]
    for name in names:
        if found := _look_up(_SCOPES, name):
            return found
    if kernel is not None and (found := _look_up(_KERNELS, kernel.lower())):
        return found
    for name in reversed(names):
        if found := _look_up(_OPERATIONS, name):
            return found
    return OTHER


def _look_up(table: Sequence[tuple[re.Pattern[str], str]], name: str) -> str | None:
    return next((family for pattern, family in table if pattern.search(name)), None)
