"""The adjoints of one tile of scores, shared by the backward kernels."""

import triton
import triton.language as tl

from tangent_kernels.attention._tiles import LOG2_E, kept, load_mask, masked


@triton.jit
def adjoints(
    scores,  # Q Kᵀ; the tiles may be transposed, keys by queries
    grad_p,  # A = H Vᵀ
    scores_t,  # Q_t Kᵀ + Q K_tᵀ, or None where S_t is zero or not needed
    grad_p_t,  # B = G Vᵀ + H V_tᵀ; None without SECOND
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
    SECOND: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """P and P_t after dropout, grad_S_t and grad_S, all float32.

        grad_S_t = P∘(A - δ)        A = H Vᵀ
        grad_S = P∘(B - ε + (A - δ)∘(S_t - μ))        B = G Vᵀ + H V_tᵀ        P_t = P∘(S_t - μ)

    Without SECOND, P_t and grad_S have no meaning.
    """
    scores = scores * (scale * LOG2_E)
    scores = masked(scores, rows, cols, queries, keys, mask, BOOLEAN, CAUSAL, EDGE)
    p = tl.exp2(scores - lse2)
    p_kept = p
    if dropout is not None:
        keep = kept(dropout, rows, cols)
        grad_p *= keep
        p_kept = p * keep
    centred_p = grad_p - delta
    grad_s_t = p * centred_p
    p_t = p_kept
    grad_s = grad_s_t
    if SECOND:
        if dropout is not None:
            grad_p_t *= keep
        grad_s = grad_p_t - epsilon
        if mu is not None:
            scores_t *= scale
            if mask_t is not None:
                scores_t += load_mask(mask_t, rows, cols, queries, keys, 0.0).to(tl.float32)
            centred = scores_t - mu
            grad_s += centred_p * centred
            p_t = p_kept * centred
        grad_s = p * grad_s
    return p_kept, p_t, grad_s_t, grad_s
