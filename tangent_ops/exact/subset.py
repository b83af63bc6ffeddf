"""`SubsetInverse`: the exact inverse of a part of the samples' Hessian, as a preconditioner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tangent_ops.exact.passes import Passes
from tangent_ops.exact.stored import Stored
from tangent_ops.losses import loss_hessians

ROWS = 2000  # of the Gram matrix; its decomposition is a few tenths of a second on a CPU


class SubsetInverse:
    """(Σ_s N_s/m_s Σ_i J_iᵀ A_i J_i + Σ_s N_s l2 I)⁻¹ over m_s random samples of each shard s.

    By Woodbury's identity with A = L Lᵀ, each scaled by N_s/m_s, and the penalty λ,

        H⁻¹ v = (v - Jᵀ L (Lᵀ J Jᵀ L + λ I)⁻¹ Lᵀ J v) / λ

    so it takes one Gram matrix, and an application takes one product with the part's J. If the part
    is all samples, the inverse is exact, and conjugate gradients end after one iteration.

    Args:
        shards: passes over stored samples, which have the same parts, l2 and loss.
        rows: m C, about how many rows of J the part has, of all shards together.
        logits: of every batch of a single shard, at which A is taken; None for those at Δ = 0.
        seed: of the samples.
    """

    def __init__(
        self,
        shards: Sequence[Passes],
        rows: int = ROWS,
        logits: Sequence[Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        samples = sum(passes.samples for passes in shards)
        share = min(1.0, rows / (samples * shards[0].outputs))
        parts, roots = [], []
        for passes in shards:
            drawn = _drawn(passes.samples, max(1, round(share * passes.samples)), seed)
            pairs = list(passes.take(drawn).batches())
            part = Stored.joined([some for some, _ in pairs])
            targets = torch.cat([labels for _, labels in pairs])
            where = part.logits if logits is None else torch.cat(list(logits))[drawn]
            where = where.view(len(part), *part.shape)
            hessians = loss_hessians(passes.loss, where, targets).double()
            parts.append(part)
            roots.append(_roots(hessians * (passes.samples / len(part))))
        self._part = Stored.joined(parts)
        self._penalty = sum(passes.samples * passes.l2 for passes in shards)
        self._roots = torch.cat(roots)  # (m, C, C): L
        n, c, _ = self._roots.shape
        gram = self._part.gram(self._part).view(n, c, n, c)
        gram = torch.einsum("iab,iajd,jde->ibje", self._roots, gram, self._roots)
        gram = gram.reshape(n * c, n * c)
        gram.diagonal().add_(self._penalty)
        dtype = self._part.logits.dtype
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:  # rounding exceeds the penalty; a preconditioner need not be exact
            shift = torch.finfo(dtype).eps * gram.diagonal().sum()
            factor = torch.linalg.cholesky(gram + shift * torch.eye(n * c).to(gram))
        self._factor = factor.to(dtype)
        self._roots = self._roots.to(dtype)

    def __call__(self, vector: Tensor) -> Tensor:
        """The inverse times a vector (P,) or vectors (R, P), times λ."""
        vectors = vector.view(-1, vector.shape[-1])
        n, c, _ = self._roots.shape
        moved = torch.einsum("rna,nab->rnb", self._part.jvp(vectors), self._roots)
        solved = torch.cholesky_solve(moved.flatten(1).T, self._factor).T.view(-1, n, c)
        result = vectors.neg()
        self._part.add_vjp(torch.einsum("rnb,nab->rna", solved, self._roots), result)
        return result.neg_().view(vector.shape)


def _drawn(samples: int, count: int, seed: int) -> list[int]:
    """Indices of some of the samples, drawn without replacement, in order."""
    if count == samples:
        return list(range(samples))
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist())


def _roots(hessians: Tensor) -> Tensor:
    """L with A = L Lᵀ of positive semi-definite matrices (n, C, C)."""
    values, vectors = torch.linalg.eigh(hessians)
    return vectors * values.clamp_min(0).sqrt()[:, None, :]
