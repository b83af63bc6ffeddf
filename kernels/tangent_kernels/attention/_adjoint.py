"""The adjoints of one tile of scores, shared by the backward kernels."""

import triton
import triton.language as tl

from tangent_kernels.attention._tiles import LOG2_E, kept, load_mask


@triton.jit
def adjoints(
    scores,  # Q Kᵀ; the tiles may be transposed, keys by queries
    grad_p,  # A = H Vᵀ, or None where no gradient by the scores is needed
    scores_t,  # Q_t Kᵀ + Q K_tᵀ, with SECOND
    lse2,  # lse in units of log2; this and the next three broadcast along the keys
    mu,  # Σ P S_t, or None where S_t is zero
    delta,  # H·O
    epsilon,  # G·O + H·O_t, or None
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
    """P and P_t after dropout, grad_S_t, and grad_S without the term of B; all float32.

        grad_S_t = P∘(A - δ)        A = H Vᵀ        P_t = P∘(S_t - μ)
        grad_S = P∘B + rest         rest = P∘((A - δ)∘(S_t - μ) - ε)

    B comes last, so that its product can follow when S_t and A no longer take registers. Without
    SECOND, P_t and the rest have no meaning.
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
        inside = cols < keys
        if CAUSAL:
            inside = inside & (cols <= rows)
        scores = tl.where(inside, scores, float("-inf"))
    p = tl.exp2(scores)
    p_kept = p
    if dropout is not None:
        keep = kept(dropout, rows, cols)
        p_kept = p * keep
    p_t = p_kept
    if SECOND and mu is not None:
        centred = scores_t * scale - mu
        if mask_t is not None:
            centred += load_mask(mask_t, rows, cols, queries, keys, 0.0).to(tl.float32)
        p_t = p_kept * centred
    grad_s_t = p
    rest = p
    if grad_p is not None:
        if dropout is not None:
            grad_p *= keep
        centred_p = grad_p - delta
        grad_s_t = p * centred_p
        if SECOND:
            if mu is not None:
                rest = p * (centred_p * centred - epsilon)
            else:
                rest = -p * epsilon
    return p_kept, p_t, grad_s_t, rest
