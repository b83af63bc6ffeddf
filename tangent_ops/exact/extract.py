"""`Extractor`: the layer factors of J for batches of inputs, by C backward passes of the anchor."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_ops.errors import UnsupportedError, few
from tangent_ops.exact.jacobian import Jacobian
from tangent_ops.exact.parts import Factors, Part, Place, Rows
from tangent_ops.exact.recorded import MapCall, Recording, Used, covered_by, grouped
from tangent_ops.exact.stored import Stored
from tangent_ops.exact.weights import weights_of
from tangent_ops.family import family_of
from tangent_ops.fields import Fields, Inputs, each_tensor
from tangent_ops.model.linearized import LinearizedModel
from tangent_ops.ops.levels import functional_call, in_turn

CHECKED = 8  # samples of the comparison with J by passes
CHECKED_BYTES = 1 << 28  # of their J
CHUNK = 1 << 24  # entries of a layer's explicit rows that are formed at a time


class Extractor:
    """Makes `Stored` of batches of inputs.

    The constructor runs the model on one input and finds out how each trained parameter is used;
    `check` compares Jᵀu, parameter by parameter, with `Jacobian.pull_back`. A weight of linear maps
    gives `Factors`. The parameters of another module that is called once with one tensor give
    `Rows`, by functorch over that module alone. What remains gives `Rows` by backward passes for
    one sample at a time, which is slow.

    Args:
        tangent: the model.
        inputs: (n, ...), of which the first one is read.
        explicit: all rows are explicit.

    Attributes:
        bytes_per_sample: of J of a sample.
        work_per_sample: floating-point operations of J v and Jᵀ u.
    """

    def __init__(self, tangent: LinearizedModel, inputs: Inputs, *, explicit: bool = False) -> None:
        self._tangent = tangent
        self._jacobian = Jacobian(tangent)
        self._explicit = explicit
        self._weights = weights_of(tangent)
        self._slow: set[str] = set()
        self._plan(inputs[:1].to(self._jacobian.device))

    def check(self, inputs: Inputs) -> None:
        """Compare J of the first few inputs with that by passes.

        Raises:
            UnsupportedError: the factors do not give J: the model mixes samples, for example.
        """
        count = max(1, min(CHECKED, CHECKED_BYTES // self.bytes_per_sample))
        inputs = inputs[:count].to(self._jacobian.device)
        wrong = self._wrong(inputs)
        if wrong and self._slow.isdisjoint(wrong):  # also used outside of the layers
            self._slow |= wrong
            self._plan(inputs[:1])
            wrong = self._wrong(inputs)
        if wrong:
            raise UnsupportedError(
                f"layer factors do not give the derivative by {few(sorted(wrong))}: the model "
                "mixes samples, or its samples are not in the first dimension. Use "
                "representation='passes'"
            )

    def __call__(self, inputs: Inputs) -> Stored:
        """J of some inputs (n, ...), with f of them."""
        inputs = inputs.to(self._jacobian.device)
        if not self._slow:
            return self._of_batch(inputs)
        return Stored.joined([self._of_batch(one) for one in inputs.split(1)])

    def alone(self, one: Inputs) -> Stored:
        """J of one input, (1, ...), with the same bits whatever other samples there are.

        The model runs on C copies, and each goes back from another output: one pass, not C.
        """
        one = one.to(self._jacobian.device)
        if self._slow:
            return self._of_batch(one)
        copies = self._outputs
        used = self._run(each_tensor(one, lambda x: x.expand(copies, *x.shape[1:]).contiguous()))
        outputs = used.output.flatten(1)
        edges = [call.edge for call in used.maps if call.names <= self._covered]
        edges += [edge for *_, edge in used.modules]
        found: list[Tensor | None] = [None] * len(edges)
        if edges and outputs.requires_grad:
            eye = torch.eye(copies, dtype=outputs.dtype, device=outputs.device)
            grads = torch.autograd.grad(outputs, edges, eye, allow_unused=True)
            found = [None if g is None else g.unflatten(0, (copies, -1)) for g in grads]
        return self._stored(used, found, 1)

    def _plan(self, inputs: Inputs) -> None:
        """Find out which modules' parameters `Factors` do not cover, and which remain."""
        self._modules: dict[str, nn.Module] = {}
        used = self._run(inputs)
        self._precision = used.output.dtype
        size = self._jacobian.layout.size
        cores = {n for n, weight in self._weights.items() if weight.left is not None}
        covered, shared = covered_by(used.maps, self._weights, size, self._slow, cores)
        rest = self._weights.keys() - covered
        # Only now, since a module with a hook may not be run in its cheapest form.
        for name, module in self._tangent.anchor.named_modules():
            own = {_joined(name, key) for key, _ in module.named_parameters(recurse=False)} & rest
            if own and own.isdisjoint(self._slow):
                self._modules[name] = module
        used = self._run(inputs)
        calls = Counter(name for name, *_ in used.modules)
        for name, module in list(self._modules.items()):
            own = {_joined(name, key) for key, _ in module.named_parameters(recurse=False)} & rest
            if calls[name] == 1:
                rest -= own
            else:
                del self._modules[name]
        self._covered, self._shared_cores, self._slow = covered, shared, rest
        self._count(used)

    def _count(self, used: Used) -> None:
        """Count entries and operations of a sample's parts, from the shapes of one sample."""
        outputs = self._outputs = used.output[0].numel()
        by_rows = self._weights.keys() - self._covered
        entries = outputs * (1 + sum(self._weights[name].place.size for name in by_rows))
        work = 4 * entries
        for group in grouped([call for call in used.maps if call.names <= self._covered]):
            shapes = [call.shape for call in group]
            h, _, k, o = shapes[0]
            t = sum(shape[1] for shape in shapes)
            if self._explicit or _rows_are_cheaper(t, k, o, outputs):
                entries += outputs * h * o * (k + 1)
                work += 4 * outputs * h * o * (k + 1)
            else:
                entries += h * t * (k + outputs * o)
                work += 4 * h * t * o * (k + outputs)
        self.bytes_per_sample = entries * self._jacobian.layout.dtype.itemsize
        self.work_per_sample = work

    def _wrong(self, inputs: Inputs) -> set[str]:
        """Parameters by which Jᵀu differs from that of a pass, for a random u."""
        layout = self._jacobian.layout
        stored = self(inputs)
        noise = torch.Generator().manual_seed(0)
        u = torch.randn(stored.logits.shape, generator=noise).to(stored.logits)
        total = layout.zeros()
        stored.add_vjp(u[None], total[None])
        exact = self._jacobian.pull_back(
            layout.zeros(), inputs, lambda primal, _: u.view(primal.shape).to(primal.dtype)
        )
        size = torch.stack([part.double().norm() for part in exact]).norm()
        tolerance = 3 * torch.finfo(self._precision).eps ** 0.5
        wrong = set()
        for (name, found), right in zip(layout.named(total).items(), exact, strict=True):
            off = (found.double() - right.double()).norm()
            # A gradient that is rounding, such as that of keys' biases, is not compared.
            if not off <= tolerance * right.double().norm() + 10 * tolerance**2 * size:
                wrong.add(name)
        return wrong

    def _of_batch(self, inputs: Inputs) -> Stored:
        used = self._run(inputs)
        edges = [call.edge for call in used.maps if call.names <= self._covered]
        edges += [edge for *_, edge in used.modules]
        found = self._cotangents(used, edges + list(used.leaves.values()))
        return self._stored(used, found, len(inputs))

    def _stored(self, used: Used, found: list[Tensor | None], count: int) -> Stored:
        """J of `count` samples from the cotangents (C, ...) of maps, modules and leaves."""
        logits = used.output.detach().flatten(1)[:count].to(self._jacobian.layout.dtype)
        calls = [call for call in used.maps if call.names <= self._covered]
        cotangents = dict(zip(map(id, calls), found, strict=False))
        parts: list[Part] = []
        cores: dict[str, list[Rows]] = {}
        for group in grouped(calls):
            given = [cotangents[id(call)] for call in group]
            for part in self._factors(group, given, len(used.output), count):
                shared = next(iter(group[0].names & self._shared_cores), None)
                if shared is not None:
                    cores.setdefault(shared, []).append(part.as_rows())
                else:
                    parts.append(part.as_rows() if self._are_rows(part) else part)
        places = {name: self._weights[name].place for name in cores}
        parts += [_added(several, places[name]) for name, several in cores.items()]
        rows: dict[str, Tensor] = {}
        for (name, seen, _), g in zip(used.modules, found[len(calls) :], strict=False):
            if g is not None:
                rows |= self._module_rows(name, seen[:count], g)
        first = len(calls) + len(used.modules)
        for name, g in zip(used.leaves, found[first:], strict=True):
            if g is not None:
                rows[name] = g[None]  # one sample at a time
        if rows:
            dtype = self._jacobian.layout.dtype
            of_deltas = [self._weights[n].of_rows(value).to(dtype) for n, value in rows.items()]
            places = tuple(self._weights[name].place for name in rows)
            parts.append(Rows(torch.cat(of_deltas, dim=2), places))
        return Stored(logits, tuple(parts), used.output.shape[1:])

    def _factors(
        self, group: list[MapCall], cotangents: list[Tensor | None], ran: int, count: int
    ) -> list[Factors]:
        """The calls of one linear map on the first of the samples it ran on, as one part."""
        kept = [(c, g) for c, g in zip(group, cotangents, strict=True) if g is not None]
        if not kept:
            return []
        inputs = torch.cat([call.activations(ran)[:count] for call, _ in kept], dim=2)
        outputs = torch.cat([call.cotangents(g, count) for call, g in kept], dim=3)
        dtype = self._jacobian.layout.dtype
        return [Factors(inputs.to(dtype), outputs.to(dtype), *group[0].places)]

    def _are_rows(self, part: Factors) -> bool:
        _, c, _, t, o = part.cotangents.shape
        return self._explicit or _rows_are_cheaper(t, part.inputs.shape[3], o, c)

    def _module_rows(self, name: str, seen: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        """(n, C, ...) by a module's own parameters; the cotangents are (C, n, ...)."""
        module = self._modules[name]
        own = {
            key: value.detach()
            for key, value in module.named_parameters(recurse=False)
            if _joined(name, key) in self._weights and _joined(name, key) not in self._covered
        }

        def of_sample(one: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
            def call(parameters: dict[str, Tensor]) -> Tensor:
                return torch.func.functional_call(module, parameters, (one[None],))[0]

            (rows,) = vmap(vjp(call, own)[1])(cotangent)
            return rows

        size = cotangents.shape[0] * sum(value.numel() for value in own.values())
        step = max(1, CHUNK // size)
        chunks = zip(seen.split(step), cotangents.transpose(0, 1).split(step), strict=True)
        with sdpa_kernel(SDPBackend.MATH):  # attention's other backends have no rule for vmap
            found = [vmap(of_sample)(one, cotangent) for one, cotangent in chunks]
        return {_joined(name, key): torch.cat([rows[key] for rows in found]) for key in own}

    def _cotangents(self, used: Used, at: list[Any]) -> list[Tensor | None]:
        """For each tensor in the graph, the cotangents (C, ...) of the C outputs."""
        outputs = used.output.flatten(1)
        if not at or not outputs.requires_grad:
            return [None] * len(at)
        columns = outputs.shape[1]
        found = []
        for column in range(columns):
            last = column + 1 == columns
            of_all = outputs[:, column].sum()  # samples do not depend on each other
            found.append(torch.autograd.grad(of_all, at, retain_graph=not last, allow_unused=True))
        return [
            None if all(g is None for g in each) else torch.stack(_filled(each))
            for each in zip(*found, strict=True)
        ]

    def _run(self, inputs: Inputs) -> Used:
        """The anchor's forward pass, with a graph of the tensors of interest."""
        anchor, weights = self._tangent.anchor, self._weights
        family, used = family_of(anchor), Used()
        used.leaves = {name: weights[name].tensor.detach().requires_grad_() for name in self._slow}
        handles = [
            module.register_forward_hook(used.hook(name), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        device = self._jacobian.device
        recording = Recording(used.maps, weights)

        def run() -> Any:
            with torch.enable_grad(), torch.autocast(device.type, enabled=False), recording:
                named = inputs.tensors if isinstance(inputs, Fields) else {}
                args = () if named else (inputs,)
                return family.logits(functional_call(anchor, used.leaves, args, named))

        def call() -> Any:
            with self._tangent.kept.nothing():
                return run()

        try:
            used.output = in_turn(call)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(used.output, Tensor) or len(used.output) != len(inputs):
            raise UnsupportedError(
                f"the model's output is a {type(used.output).__name__}; layer factors need one "
                "tensor with a row to each sample"
            )
        return used


def _rows_are_cheaper(positions: int, inputs: int, outputs: int, columns: int) -> bool:
    """Whether explicit rows of C columns take fewer operations than T positions."""
    return columns * inputs < positions * (inputs + columns)


def _added(several: list[Rows], place: Place) -> Rows:
    """The rows of maps that share a parameter, at its place."""
    n, c, _ = several[0].rows.shape
    total = several[0].rows.new_zeros(n * c, place.size)
    for part in several:
        (view,) = part.places
        inside = replace(view, offset=view.offset - place.offset)
        inside.of(total).add_(part.rows.view(n * c, *view.shape))
    return Rows(total.view(n, c, place.size), (place,))


def _filled(cotangents: tuple[Tensor | None, ...]) -> list[Tensor]:
    shape = next(g for g in cotangents if g is not None)
    return [torch.zeros_like(shape) if g is None else g for g in cotangents]


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
