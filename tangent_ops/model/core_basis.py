"""`core_basis`: the fixed sides B and A of cores, Δw = B C A, from public data."""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tangent_ops.data import Data, as_loader, check_choice, check_integer, place, unpack
from tangent_ops.delta import fingerprint
from tangent_ops.errors import ArgumentError, NonFiniteLossError, few
from tangent_ops.family import block_names, family_of, heads_of, logits_of, names_of, parts_pattern
from tangent_ops.fields import Inputs, named_tensors
from tangent_ops.files import add_tensor
from tangent_ops.losses import RescaledSquareLoss
from tangent_ops.model.features import Tail
from tangent_ops.model.gradient_basis import canonical_rows
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.model.low_rank import core_sizes, delta_dtype, drawn_sides, matrix_shape
from tangent_ops.model.trainable import Trainable, choose

METHODS = ("kfac", "gradient", "random")


class CoreBasis(dict[str, tuple[Tensor, Tensor]]):
    """name -> (B, A) of each weight with a core; ``linearize(model, core=basis)`` trains C.

    Args:
        sides: B (out, r_out) and A (r_in, in) of each weight.
        whole: names of the parameters that are trained beside the cores, in full.
        remembers: `sample_sha256` of each input that the sides were computed from.

    Attributes:
        whole: as given.
        remembers: as given.
    """

    def __init__(
        self,
        sides: Mapping[str, tuple[Tensor, Tensor]],
        whole: Iterable[str] = (),
        remembers: Iterable[bytes] = (),
    ) -> None:
        super().__init__(sides)
        self.whole = tuple(whole)
        self.remembers = frozenset(remembers)

    @property
    def directions(self) -> int:
        """Numbers in all cores together."""
        return sum(left.shape[1] * len(right) for left, right in self.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all sides, in hexadecimal; that of a tangent model with this basis."""
        sides = {f"left.{name}": left for name, (left, _) in self.items()}
        return fingerprint(sides | {name: right for name, (_, right) in self.items()})

    @property
    def trainable(self) -> str:
        """The pattern of the parameters that `linearize` trains."""
        return rf"^({'|'.join(map(re.escape, sorted([*self, *self.whole])))})$"

    def __repr__(self) -> str:
        return (
            f"CoreBasis({len(self)} weights, {self.directions:,} directions; "
            f"{len(self.whole)} parameters in full)"
        )


def core_basis(
    model: nn.Module,
    public_data: Data | None,
    size: int | tuple[int, int] = 8,
    *,
    directions: int | None = None,
    trainable: Trainable = None,
    vectors: bool = False,
    method: str = "kfac",
    seed: int = 0,
    batch_size: int = 32,
) -> CoreBasis:
    """Fixed sides of cores for ``linearize(model, core=basis)``: few directions that matter.

    "kfac": with the inputs a_t of a linear layer at each position t and the cotangents g_ct of its
    outputs for each output c of the model, B has the leading eigenvectors of Σ g gᵀ and A those of
    Σ a aᵀ, the factors of the Gauss-Newton matrix's Kronecker approximation (Martens, Grosse,
    "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015).
    "gradient": singular vectors of the mean square loss's gradient, as `gradient_basis`.
    "random": independent of any data.

    Deltas and statistics add up if they have the same basis: compute it once, on data that every
    owner of a shard may know. A basis remembers its data, whatever is forgotten later. So
    `tangent_ops.statistics` refuses samples that the basis was computed from.

    Args:
        model: the model to linearize; a copy of it runs, in eval mode.
        public_data: a Dataset of (input, target), or a DataLoader, read once; targets are used by
            "gradient" only. None for "random".
        size: rows and columns of each C: r, or (r_out, r_in); at most those of the weight.
        directions: instead of one size for all, about this many numbers in all cores together, at
            most; the sizes are chosen by the products of eigenvalues across layers ("kfac" only).
        trainable: which parameters, as in :func:`tangent_ops.linearize`; None for the last of the
            model's blocks, or all parameters if there are none. Of these, weights of linear
            layers have cores, and the classifier is trained in full.
        vectors: the other parameters of `trainable` (norms, biases, LayerScale) are trained in
            full, too.
        method: "kfac", "gradient" or "random".
        seed: of "random".
        batch_size: of a Dataset; a DataLoader has its own.

    Raises:
        ArgumentError: an argument is not as above, or no linear layer is among the parameters.
        NonFiniteLossError: the moments are not finite.
    """
    check_choice("method", method, METHODS)
    check_integer("seed", seed, 0)
    rows, columns = core_sizes(size)
    if isinstance(model, LinearizedModel):
        raise ArgumentError("model is linearized already: pass the original, or model.anchor")
    if (public_data is None) != (method == "random"):
        need = "takes no" if method == "random" else "needs"
        raise ArgumentError(f"method {method!r} {need} public_data")
    if directions is not None:
        check_integer("directions", directions, 1)
        if method != "kfac":
            raise ArgumentError(f"directions is for method 'kfac', not {method!r}: give a size")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Tail):
            module.rows = 0  # for read rows alone, weights are used in parts
    names = choose(model, _last_block(model) if trainable is None else trainable)
    head = names_of(model, heads_of(model))
    matrices = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in names and name not in head and parameter.ndim == 2
    }
    if trainable is None:  # relative position biases are matrices, too
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        linear = {id(layer.weight) for layer in layers}
        matrices = {name: weight for name, weight in matrices.items() if id(weight) in linear}
    if not matrices:
        raise ArgumentError("trainable has no matrix outside of the classifier: nothing has a core")
    sides, remembers = {}, set()
    if method == "random":
        for name, parameter in matrices.items():
            out, within = matrix_shape(parameter)
            sides[name] = drawn_sides(
                name, (min(rows, out), min(columns, within)), (out, within), seed
            )
    elif public_data is not None:
        measure = _kfac if method == "kfac" else _gradients
        loader = as_loader(public_data, batch_size, shuffle=False)
        spectra = measure(model, matrices, _remembering(loader, remembers))
        sizes = {
            name: (min(rows, len(spectrum.left)), min(columns, len(spectrum.right)))
            for name, spectrum in spectra.items()
        }
        if directions is not None:
            sizes = _chosen_sizes(spectra, directions)
        for name, (out, within) in sizes.items():
            if out and within:
                sides[name] = spectra[name].leading(out, within)
    whole = [n for n in names if n in head or (vectors and n not in matrices)]
    kept = {
        name: tuple(
            side.to(matrices[name].device, delta_dtype(matrices[name].dtype)).contiguous()
            for side in pair
        )
        for name, pair in sides.items()
    }
    return CoreBasis(kept, sorted({*whole, *head}), remembers)


def sample_sha256(one: Inputs) -> bytes:
    """A hash of one sample's input, by which a sample that a basis remembers is recognized."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(one).items()):
        digest.update(name.encode())
        add_tensor(digest, tensor)
    return digest.digest()


def _remembering(loader: Any, remembers: set[bytes]) -> Iterator[Any]:
    for batch in loader:
        yield batch
        remembers.update(sample_sha256(one) for one in unpack(batch, torch.device("cpu"))[0])


class _Spectrum:
    """Directions of a weight's outputs and inputs, by falling importance.

    Attributes:
        left: eigenvalues of the outputs' side, falling.
        right: those of the inputs' side.
    """

    def __init__(self, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
        (self.left, self._left), (self.right, self._right) = left, right

    def leading(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """B (out, rows) and A (columns, in)."""
        return canonical_rows(self._left[:rows]).T, canonical_rows(self._right[:columns])


def _kfac(model: nn.Module, matrices: Mapping[str, Tensor], loader: Any) -> dict[str, _Spectrum]:
    """Eigenvectors of the second moments of inputs and of outputs' cotangents."""
    device = place(model, None)
    inputs_of: dict[str, Tensor] = {}
    cotangents_of: dict[str, Tensor] = {}
    for parameter in matrices.values():
        parameter.requires_grad_()
    for batch in loader:
        inputs, _ = unpack(batch, device)
        recording = _Recording(matrices)
        with torch.enable_grad(), recording:
            outputs = logits_of(model, inputs).flatten(1)
        calls = recording.calls
        if not calls:
            raise ArgumentError("no linear layer uses the parameters of trainable")
        for name, seen, _ in calls:
            _add_moment(inputs_of, name, seen)
        for column in range(outputs.shape[1]):
            last = column + 1 == outputs.shape[1]
            at = [output for *_, output in calls]
            grads = torch.autograd.grad(
                outputs[:, column].sum(), at, retain_graph=not last, allow_unused=True
            )
            for (name, *_), grad in zip(calls, grads, strict=True):
                if grad is not None:
                    _add_moment(cotangents_of, name, grad)
    unused = sorted(matrices.keys() - (inputs_of.keys() & cotangents_of.keys()))
    if unused:
        raise ArgumentError(
            f"no linear layer uses {few(unused)}, or no output depends on it: leave it out of "
            "trainable"
        )
    return {
        name: _Spectrum(_eigen(name, cotangents_of[name]), _eigen(name, inputs_of[name]))
        for name in matrices
    }


def _gradients(
    model: nn.Module, matrices: Mapping[str, Tensor], loader: Any
) -> dict[str, _Spectrum]:
    """Singular vectors of the mean square loss's gradient."""
    loss, device = RescaledSquareLoss(), place(model, None)
    for parameter in matrices.values():
        parameter.requires_grad_()
    with torch.enable_grad():
        for batch in loader:
            inputs, targets = unpack(batch, device)
            (loss(logits_of(model, inputs), targets) * len(inputs)).backward()
    found = {}
    for name, parameter in matrices.items():
        if parameter.grad is None:
            raise ArgumentError(f"the loss does not depend on {name}: leave it out of trainable")
        gradient = parameter.grad.double()
        if not gradient.isfinite().all():
            raise _not_finite(name)
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        found[name] = _Spectrum((values, left.T), (values, right))
    return found


def _add_moment(moments: dict[str, Tensor], name: str, rows: Tensor) -> None:
    flat = rows.detach().reshape(-1, rows.shape[-1]).double()
    moment = flat.T @ flat
    moments[name] = moments[name].add_(moment) if name in moments else moment


def _eigen(name: str, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Falling eigenvalues and eigenvectors, as rows."""
    if not moment.isfinite().all():
        raise _not_finite(name)
    values, vectors = torch.linalg.eigh(moment)
    return values.flip(0).clamp_min(0), vectors.flip(1).T


def _chosen_sizes(spectra: Mapping[str, _Spectrum], directions: int) -> dict[str, tuple[int, int]]:
    """Sizes of the cores with the largest products of eigenvalues, a row or column at a time.

    Each step takes the row or column with the most of Σ left_i right_j per number.
    """
    sizes: dict[str, tuple[int, int]] = dict.fromkeys(spectra, (0, 0))
    left = {name: spectrum.left.tolist() for name, spectrum in spectra.items()}
    right = {name: spectrum.right.tolist() for name, spectrum in spectra.items()}
    spent = 0
    while True:
        best: tuple[float, str, tuple[int, int]] | None = None
        for name, (rows, columns) in sizes.items():
            if not rows:
                steps = [((1, 1), left[name][0] * right[name][0], 1)]
            else:
                steps = []
                if rows < len(left[name]):
                    gain = left[name][rows] * sum(right[name][:columns])
                    steps.append(((rows + 1, columns), gain / columns, columns))
                if columns < len(right[name]):
                    gain = right[name][columns] * sum(left[name][:rows])
                    steps.append(((rows, columns + 1), gain / rows, rows))
            for size, gain, cost in steps:
                if gain > 0 and spent + cost <= directions and (best is None or gain > best[0]):
                    best = (gain, name, size)
        if best is None:
            return sizes
        _, name, size = best
        spent += math.prod(size) - math.prod(sizes[name])
        sizes[name] = size


class _Recording(TorchFunctionMode):
    """Records name, inputs and output of the calls of linear layers with some weights."""

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in matrices.items()}
        self.calls: list[tuple[str, Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self._names.get(id(weight))
            if name is not None:
                seen = args[0] if args else kwargs["input"]
                self.calls.append((name, seen.detach(), output))
        return output


def _last_block(model: nn.Module) -> str | None:
    """A pattern of the last block and the head, as no norm has a core; None without blocks."""
    if not family_of(model).blocks(model):
        return None
    last = list(block_names(model))[-1]
    names = {id(module): name for name, module in model.named_modules()}
    return parts_pattern([last, *(names[id(head)] for head in heads_of(model))])


def _not_finite(name: str) -> NonFiniteLossError:
    return NonFiniteLossError(f"the moments of {name} are not finite: check the inputs for NaN")
