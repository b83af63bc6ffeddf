"""The weights and adjoints of one tile of scores, shared by the backward kernels.

Tiles are float32, queries by keys or transposed. B comes after both functions: its product can
follow when S_t and A no longer take registers.
"""

import triton
import triton.language as tl

from tangent_kernels.attention._tiles import LOG2_E, kept, load_mask


@triton.jit
def weights(
    scores,  # Q Kᵀ
    scores_t,  # Q_t Kᵀ + Q K_tᵀ, with SECOND
    lse2,  # lse in units of log2; it and mu broadcast along the keys
    mu,  # Σ P S_t, or None where S_t is zero
    mask,
    mask_t,
    dropout,
    rows,  # indices of queries and keys, broadcasting to the tile
    cols,
    queries,
    keys,
    scale,
    checked,  # whether the tile may reach past the last key, or the diagonal of a causal mask
    SECOND: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """P, P after dropout, P_t = P∘(S_t - μ) after dropout, S_t - μ, and dropout's factors.

    The last three have no meaning where S_t is zero or nothing is dropped.
    """
    scores = scores * (scale * LOG2_E) - lse2
    if mask is not None:
        if BOOLEAN:
            allowed = load_mask(mask, rows, cols, queries, keys, 0)
            scores = tl.where(allowed != 0, scores, float("-inf"))
        else:
            bias = load_mask(mask, rows, cols, queries, keys, float("-inf"))
            scores += bias.to(tl.float32) * LOG2_E
    if checked:
        stop = keys
        if CAUSAL:
            stop = tl.minimum(keys, rows + 1)
        scores = tl.where(cols < stop, scores, float("-inf"))
    p = tl.exp2(scores)
    p_kept = p
    keep = p
    if dropout is not None:
        keep = kept(dropout, rows, cols)
        p_kept = p * keep
    p_t = p
    centred = p
    if SECOND and mu is not None:
        centred = scores_t * scale - mu
        if mask_t is not None:
            centred += load_mask(mask_t, rows, cols, queries, keys, 0.0).to(tl.float32)
        p_t = p_kept * centred
    return p, p_kept, p_t, centred, keep


@triton.jit
def adjoints(
    p,  # these three as from `weights`
    centred,
    keep,
    mu,  # None where S_t is zero, and dropout where nothing is dropped
    dropout,
    grad_p,  # A = H Vᵀ
    delta,  # H·O, broadcasting along the keys
    epsilon,  # G·O + H·O_t, with SECOND
    SECOND: tl.constexpr,
):
    """grad_S_t, and grad_S less the term of B (without SECOND it has no meaning).

    grad_S_t = P∘(A - δ)        A = H Vᵀ
    grad_S = P∘B + P∘((A - δ)∘(S_t - μ) - ε)        B = G Vᵀ + H V_tᵀ
    """
    if dropout is not None:
        grad_p *= keep
    centred_p = grad_p - delta
    grad_s_t = p * centred_p
    grad_s = grad_s_t
    if SECOND:
        grad_s = -epsilon
        if mu is not None:
            grad_s = centred_p * centred - epsilon
        grad_s *= p
    return grad_s_t, grad_s
