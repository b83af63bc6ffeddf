"""What works inside users' checkpointing, autocast, DDP, FSDP2, compile and vmap: one process.

Every cell of the table in docs/jvp-recipes.md runs. A tick: loss and gradients are those of
PyTorch's MATH attention in float64. A word: an error of that kind.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import RightLayerNorm, generator, moved
from torch import Tensor, distributed, nn
from torch._C._distributed_c10d import HashStore
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import CheckpointError, checkpoint

import tangent_ops
from tangent_ops import LinearizedModel, TangentAttention, fused_forward_ad, linearize
from tangent_ops.errors import UnsupportedError
from tangent_ops.training.fsdp import fsdp_anchor

PAGE = Path(__file__).parents[2] / "docs" / "jvp-recipes.md"
DIM = 8
X, V = (torch.randn(2, 5, DIM, generator=generator(seed)) for seed in (1, 2))
TRAINED = r"^(blocks\.1|head)\."  # something must stay frozen for fsdp_anchor
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs:UserWarning"),
]


class Attention(nn.Module):
    """Attention of packed queries, keys and values, by a given function."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend = attend
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer's block; its norm is PyTorch's, or none."""

    def __init__(self, attention: nn.Module, norm: nn.Module):
        super().__init__()
        self.norm, self.attn = norm, attention
        self.mlp = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Net(nn.Module):
    """Two blocks and a head; `around` is how a block is called."""

    def __init__(self, make: Callable[[], Block]):
        super().__init__()
        self.blocks = nn.ModuleList([make(), make()])
        self.head = nn.Linear(DIM, 3)
        self.around: Callable[..., Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.around(block, x)
        return self.head(x.mean(1))


def net(attend: Callable[..., Tensor] | None, norm: bool) -> Net:
    """Weights depend on `norm` alone; without `attend` the attention is TangentAttention."""
    torch.manual_seed(0)

    def block() -> Block:
        attention = Attention(attend or F.scaled_dot_product_attention)
        return Block(attention, nn.LayerNorm(DIM) if norm else nn.Identity())

    model = Net(block)
    blocks: Any = model.blocks if attend is None else []
    for each in blocks:
        ours = TangentAttention(DIM, 2, qkv_bias=True)
        ours.load_state_dict(each.attn.state_dict())
        each.attn = ours
    return model


class Subject:
    """One way to compute a tangent, as a loss and the gradients of it.

    Attributes:
        model: What DDP, FSDP and compile go around.
        inner: The model with blocks: `model`, or its anchor.
        context: What the jvp runs in.
    """

    def __init__(self, name: str):
        self.name = name
        self.context: Callable[[], Any] = contextlib.nullcontext
        self.model = self._made()
        self.inner = getattr(self.model, "anchor", self.model)

    def _made(self) -> Any:
        # Without the context, PyTorch differentiates the tangents of its layer norm wrongly.
        if self.name == "op":
            return net(tangent_ops.scaled_dot_product_attention, norm=False)
        if self.name == "TangentAttention":
            return net(None, norm=False)
        model = net(F.scaled_dot_product_attention, norm=True)
        if self.name == "LinearizedModel":
            return moved(linearize(model, TRAINED))
        self.context = fused_forward_ad
        return model

    def loss(self, x: Tensor, v: Tensor) -> Tensor:
        if self.name == "LinearizedModel":
            return squares(self.model(x), torch.zeros(()))
        with self.context():
            return squares(*torch.func.jvp(self.model, (x,), (v,)))

    def gradients(self) -> dict[str, Tensor]:
        model = self.original
        named = model.deltas() if isinstance(model, LinearizedModel) else model.named_parameters()
        found = {}
        for name, parameter in dict(named).items():
            grad: Any = parameter.grad
            assert grad is not None, name
            found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        return found

    @property
    def original(self) -> Any:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model


def squares(y: Tensor, y_t: Tensor) -> Tensor:
    y, y_t = y.float(), y_t.float()
    return (y.square() + y * y_t + y_t.square()).sum()


class Loss(nn.Module):
    """The jvp and the loss as the forward pass of a module."""

    def __init__(self, subject: Subject):
        super().__init__()
        self.model, self.loss = subject.model, subject.loss

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        return self.loss(x, v)


# The rows of the table: each gives the loss.


def around(subject: Subject, reentrant: bool) -> Tensor:
    x = X.clone().requires_grad_()  # without one, a reentrant checkpoint tracks nothing
    return checkpoint(subject.loss, x, V, use_reentrant=reentrant)  # pyright: ignore


def within(subject: Subject, reentrant: bool) -> Tensor:
    subject.inner.around = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    return subject.loss(X, V)


def autocast(subject: Subject, dtype: str) -> Tensor:
    with torch.autocast("cpu", DTYPES[dtype]):
        return subject.loss(X, V)


def ddp(subject: Subject) -> Tensor:
    subject.model = DistributedDataParallel(subject.model)
    return subject.loss(X, V)


def ddp_of_the_loss(subject: Subject) -> Tensor:
    return DistributedDataParallel(Loss(subject))(X, V)


def sharded(subject: Subject) -> Tensor:
    if not isinstance(subject.model, LinearizedModel):
        for block in subject.inner.blocks:
            fully_shard(block)
    fully_shard(subject.model)
    return subject.loss(X, V)


def sharded_blocks(subject: Subject) -> Tensor:
    for block in subject.inner.blocks:
        fully_shard(block)
    return subject.loss(X, V)


def sharded_loss(subject: Subject) -> Tensor:
    module = Loss(subject)
    fully_shard(module)
    return module(X, V)


def sharded_level(subject: Subject) -> Tensor:
    for block in subject.inner.blocks:
        fully_shard(block)
    with subject.context(), forward_ad.dual_level():
        return squares(*forward_ad.unpack_dual(subject.model(forward_ad.make_dual(X, V))))


def anchor(subject: Subject) -> Tensor:
    fsdp_anchor(subject.model)
    return subject.loss(X, V)


def compiled(subject: Subject) -> Tensor:
    return torch.compile(subject.loss, backend="aot_eager", fullgraph=True)(X, V)


def vmapped(subject: Subject) -> Tensor:
    """Of the directions V and 2V in one call, of which the first counts."""
    if subject.name == "LinearizedModel":
        outputs = torch.func.vmap(lambda x: subject.model(x[None])[0])(X)
        return squares(outputs, torch.zeros(()))
    with subject.context():
        one = lambda v: torch.func.jvp(subject.model, (X,), (v,))  # noqa: E731
        y, y_t = torch.func.vmap(one)(torch.stack([V, 2 * V]))
    return squares(y[0], y_t[0])


ROWS: dict[str, Callable[[Subject], Tensor]] = {
    "checkpoint around the jvp": lambda subject: around(subject, False),
    "reentrant checkpoint around the jvp": lambda subject: around(subject, True),
    "checkpoint within the model": lambda subject: within(subject, False),
    "reentrant checkpoint within the model": lambda subject: within(subject, True),
    "autocast to bfloat16": lambda subject: autocast(subject, "bfloat16"),
    "autocast to float16": lambda subject: autocast(subject, "float16"),
    "jvp of a DDP module": ddp,
    "DDP around a module that computes the jvp": ddp_of_the_loss,
    "jvp of a model under `fully_shard`": sharded,
    "jvp of a model with blocks under `fully_shard`": sharded_blocks,
    "`fully_shard` of a module that computes the jvp": sharded_loss,
    "`dual_level()` of blocks under `fully_shard`": sharded_level,
    "`fsdp_anchor`": anchor,
    "`torch.compile` of the jvp": compiled,
    "`vmap` of the jvp": vmapped,
}
COLUMNS = {
    "`fused_forward_ad`": "fused_forward_ad",
    "the attention function": "op",
    "`TangentAttention`": "TangentAttention",
    "`LinearizedModel`": "LinearizedModel",
}
# The words of the table, and the errors that they stand for.
ERRORS: dict[str, tuple[type[Exception], str]] = {
    "inside": (UnsupportedError, "inside the function, or switch the model's checkpointing off"),
    "unsaved": (CheckpointError, "A different number of tensors was saved"),
    "refused": (RuntimeError, "it must override the setup_context"),
    "jvp": (UnsupportedError, "[Uu]se torch.func.jvp"),
    "view": (RuntimeError, "the jvp is not returning a view"),
    "anchor": (UnsupportedError, r"divide the anchor with tangent_ops.training.fsdp.fsdp_anchor"),
    "no jvp": (NotImplementedError, "must implement the jvp function for custom autograd.Function"),
    "wrapper": (NotImplementedError, "Cannot access storage of TensorWrapper"),
}
# What torch 2.11 raises in other cells than a tangent model's: (cell, row) -> error.
OLDER_ERRORS = {
    ("inside", "checkpoint within the model"): "no jvp",
    ("unsaved", "checkpoint within the model"): "no jvp",
    ("view", "`dual_level()` of blocks under `fully_shard`"): "no jvp",
    ("✓", "jvp of a model under `fully_shard`"): "wrapper",
    ("✓", "jvp of a model with blocks under `fully_shard`"): "wrapper",
}
if TorchVersion(torch.__version__) >= "2.12":
    OLDER_ERRORS = {}


def _marks(row: str, column: str) -> list[pytest.MarkDecorator]:
    """Compiling takes seconds: by default one of the columns."""
    return [pytest.mark.long] if "compile" in row and "fused" not in column else []


def table() -> dict[tuple[str, str], str]:
    lines = re.findall(r"^\| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    start = next(i for i, row in enumerate(cells) if COLUMNS.keys() <= {*row})
    names = cells[start][1:]
    rows = [row for row in cells[start + 2 :] if len(row) == len(names) + 1]
    return {(row[0], name): cell for row in rows for name, cell in zip(names, row[1:], strict=True)}


CELLS = table()
MARKED = [
    pytest.param(row, column, id=f"{row}, {column}".replace("`", ""), marks=_marks(row, column))
    for (row, column), cell in CELLS.items()
    if cell  # empty: the row is not about this column
]


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    yield
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def exact() -> Callable[[str], tuple[float, dict[str, Tensor]]]:
    """Loss and gradients in float64, by MATH attention and a layer norm with right derivatives."""
    kept: dict[str, Any] = {}

    def of(name: str) -> tuple[float, dict[str, Tensor]]:
        if name not in kept:
            norm = name in ("fused_forward_ad", "LinearizedModel")
            model = net(F.scaled_dot_product_attention, norm).double()
            weights = dict(model.named_parameters())
            along, inputs = weights, (X.double(),)

            def call(weights: dict[str, Tensor], x: Tensor) -> Tensor:
                return torch.func.functional_call(model, weights, (x,))

            if name == "LinearizedModel":
                tangent = Subject(name).model
                deltas = tangent.deltas().items()
                along = {n: d.detach().double().requires_grad_() for n, d in deltas}
                tangents = {n: along.get(n, torch.zeros_like(w)) for n, w in weights.items()}
                both = (weights, *inputs), (tangents, torch.zeros_like(X.double()))
            else:
                zeros = {n: torch.zeros_like(w) for n, w in weights.items()}
                both = (weights, *inputs), (zeros, V.double())
            with sdpa_kernel(SDPBackend.MATH), RightLayerNorm():
                y, y_t = torch.func.jvp(call, *both)
            if name == "LinearizedModel":
                y, y_t = y + y_t, torch.zeros(())
            loss = (y.square() + y * y_t + y_t.square()).sum()
            grads = torch.autograd.grad(loss, list(along.values()))
            kept[name] = loss.item(), dict(zip(along, grads, strict=True))
        return kept[name]

    return of


def test_the_table_has_every_cell() -> None:
    assert CELLS.keys() == {(row, column) for row in ROWS for column in COLUMNS}


@pytest.mark.parametrize(("row", "column"), MARKED)
def test_cell(row: str, column: str, exact: Callable[[str], Any]) -> None:
    cell = CELLS[row, column]
    subject = Subject(COLUMNS[column])
    if (cell, row) in OLDER_ERRORS and subject.name != "LinearizedModel":
        cell = OLDER_ERRORS[cell, row]
    if cell != "✓":
        kind, message = ERRORS[cell]
        with pytest.raises(kind, match=message):
            ROWS[row](subject).backward()
        assert forward_ad._current_level == -1
        return
    loss = ROWS[row](subject)
    loss.backward()
    right, gradients = exact(COLUMNS[column])
    tolerance = next((t for word, t in TOLERANCES.items() if word in row), 1e-5)
    assert loss.item() == pytest.approx(right, rel=tolerance)
    found = subject.gradients()
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = float((found[name].double() - gradient).norm() / gradient.norm())
        assert error <= tolerance, (name, error)


TOLERANCES = {"bfloat16": 3e-2, "float16": 4e-3}  # four roundings
