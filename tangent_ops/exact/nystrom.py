"""`Nystrom`: a randomized preconditioner, from a part of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from tangent_ops.exact.passes import Passes
from tangent_ops.exact.progress import progress_bar


def sketch_samples(samples: int) -> int:
    """An eighth of the data, but at least 32 and at most 512 samples."""
    return min(samples, max(32, min(samples // 8, 512)))


class Nystrom:
    """H ≈ U diag(e) Uᵀ + l2 I with orthonormal U (P, r), and its inverse.

    Source: Frangella, Tropp, Udell, "Randomized Nyström Preconditioning", SIAM J. Matrix Anal.
    Appl. 2023, algorithm 2.1 and section 5. Unlike there, the Hessian is that of a random part of
    the samples, at Δ = 0: its leading directions are nearly those of all samples, at a fraction of
    the cost.

    Args:
        passes: over the data; their Hessian is approximated.
        rank: r.
        seed: of the samples and of the test matrix.
    """

    def __init__(self, passes: Passes, rank: int, seed: int = 0) -> None:
        part = _sample(passes, sketch_samples(passes.samples), seed)
        logits = None if part.quadratic else part.logits(part.layout.zeros())
        layout = passes.layout
        noise = torch.Generator().manual_seed(seed)
        # Drawn on the CPU, column by column, to be the same on every device.
        test = torch.empty(layout.size, rank, dtype=layout.dtype, device=layout.device)
        for column in range(rank):
            test[:, column] = torch.randn(layout.size, generator=noise, dtype=layout.dtype)
        test = torch.linalg.qr(test).Q
        image = torch.empty_like(test)
        with progress_bar("preconditioner", "product", rank, part.progress) as bar:
            for start in range(0, rank, layout.together):
                some = slice(start, min(start + layout.together, rank))
                vectors = test[:, some].T.contiguous()
                image[:, some] = part.products(vectors, logits, penalty=False).T
                bar.update(len(vectors))
        shift = torch.finfo(layout.dtype).eps * float(image.norm())
        image.add_(test, alpha=shift)
        core = (test.T @ image).double()
        del test
        core = (core + core.T) / 2
        values, vectors = torch.linalg.eigh(core)
        kept = values > shift
        image = image @ (vectors[:, kept] / values[kept].sqrt()).to(layout.dtype)
        # The squared singular values of a tall matrix are its Gram matrix's eigenvalues.
        values, vectors = torch.linalg.eigh((image.T @ image).double())
        kept = values > values[-1:] * torch.finfo(layout.dtype).eps * rank
        values, vectors = values[kept], vectors[:, kept]
        self.basis = image @ (vectors / values.sqrt()).to(layout.dtype)
        self.values = (values - shift).clamp_min(0)
        least = float(self.values[0]) if len(self.values) else 0.0
        ratio = (least + passes.l2) / (self.values + passes.l2)
        self._less = (1 - ratio).to(layout.dtype)

    def __call__(self, vector: Tensor) -> Tensor:
        """The inverse times a vector (P,) or vectors (R, P), up to a common factor."""
        return vector - (self._less * (vector @ self.basis)) @ self.basis.T


def _sample(passes: Passes, count: int, seed: int) -> Passes:
    """The same objective over some of the samples, drawn without replacement."""
    if count == passes.samples:
        return passes
    drawn = torch.randperm(passes.samples, generator=torch.Generator().manual_seed(seed))
    return passes.take(drawn[:count].tolist())
