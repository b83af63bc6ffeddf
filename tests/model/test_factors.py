"""Deltas in factors, low rank and cores: how layers compute with them, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Computes, assert_near, exact_jvp, exact_vjp, generator, images, moved, vit
from torch import Tensor, nn
from weight_uses import USES, use, weight

from tangent_ops import last_blocks, linearize
from tangent_ops.model.export import export_program
from tangent_ops.ops import factored_calls
from tangent_ops.ops.factored import Factors
from tangent_ops.profiling.memory import saved_bytes

FORMS: dict[str, dict[str, Any]] = {"rank": {"rank": 2}, "core": {"core": (3, 2)}}
forms = pytest.mark.parametrize("form", FORMS)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*(shape or (3, 8, 8)), generator=generator(seed), dtype=torch.float64)


def full(tangent: Any) -> dict[str, Tensor]:
    """Δw by name in float64."""
    found = {name: delta.detach().double() for name, delta in tangent.deltas().items()}
    for name, right in tangent.basis.tensors().items():
        inner = found[name] @ right.double()
        left = tangent.left.tensors().get(name)
        inner = inner if left is None else left.double() @ inner
        found[name] = inner.view(tangent.anchor.get_parameter(name).shape)
    return found


def by_delta(tangent: Any, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by Δw as gradients by the deltas."""
    found = dict(gradients)
    for name, right in tangent.basis.tensors().items():
        found[name] = found[name].flatten(1) @ right.double().T
        left = tangent.left.tensors().get(name)
        found[name] = found[name] if left is None else left.double().T @ found[name]
    return found


def assert_right(tangent: Any, model: nn.Module, x: Tensor, tolerance: float = 1e-11) -> None:
    """Value, tangent and gradients are those of ``model`` by torch.func in float64."""
    assert_near(tangent.primal_and_tangent(x), exact_jvp(model, full(tangent), x), tolerance)
    output = tangent(x)
    cotangent = torch.randn(output.shape, generator=generator(2), dtype=output.dtype)
    found = torch.autograd.grad(output, list(tangent.deltas().values()), cotangent)
    exact = by_delta(tangent, exact_vjp(model, list(tangent.deltas()), cotangent, x))
    assert_near(dict(zip(tangent.deltas(), found, strict=True)), exact, tolerance)


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """Grows with every Δw that is multiplied out."""
    made: list[int] = []
    product = Factors.product
    monkeypatch.setattr(Factors, "product", lambda *args: made.append(1) or product(*args))
    return made


# --- what layers compute ---------------------------------------------------------------------


@forms
@pytest.mark.parametrize("name", USES)
def test_any_use_of_a_weight(name, form, products):
    model, whole = use(name)
    tangent = moved(linearize(model, **FORMS[form]))
    assert tangent.basis.names and bool(tangent.left.names) == (form == "core")
    x = tokens()
    assert_right(tangent, model, x)
    assert bool(products) != whole
    with torch.no_grad():
        assert_near(tangent(x), sum(exact_jvp(model, full(tangent), x)), 1e-11)


@forms
def test_a_weight_that_is_a_constant_for_a_while(form):
    """Multiplied out under no_grad(), the weight is no constant later."""

    def call(m, x):
        with torch.no_grad():
            product = 2 * m.weight
        return torch.cat([F.linear(x, product), F.linear(x, m.weight)], -1)

    torch.manual_seed(3)
    model = Computes(call, **weight()).double()
    tangent = moved(linearize(model, **FORMS[form], check=False))
    value = model.weight.detach()
    x = tokens()
    moving = F.linear(x, value + full(tangent)["weight"])
    assert_near(tangent(x), torch.cat([F.linear(x, 2 * value), moving], -1), 1e-12)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["linear", "heads", "chunks", "convolution", "convolutions"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_any_shape(name, out, within, count, seed):
    model, _ = use(name)
    tangent = moved(linearize(model, core=(out, within), basis=seed, check=False), seed)
    assert_right(tangent, model, tokens(count, 8, 8, seed=seed))
    low = moved(linearize(model, rank=within, basis=seed, check=False), seed)
    assert_right(low, model, tokens(count, 8, 8, seed=seed))


@forms
def test_a_vision_transformer_multiplies_nothing_out(form, products):
    model = vit().double()
    tangent = moved(linearize(model, **FORMS[form]))
    assert_right(tangent, model, images().double())
    assert not products


@forms
def test_float32_is_the_multiplied_out_form(form):
    model, x = vit(), images()
    tangent = moved(linearize(model, **FORMS[form]))
    whole = linearize(model)
    whole.load_delta_dict(tangent.full_delta_dict())
    assert_near(tangent.primal_and_tangent(x), whole.primal_and_tangent(x), 1e-6)


def test_a_step_saves_no_inputs_of_layers():
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    x = torch.randn(512, 64)
    low, whole = (moved(linearize(layers, rank=rank, check=False)) for rank in (4, None))
    there = [*low.parameters(), *low.buffers(), *whole.parameters(), x]
    few, many = (saved_bytes(lambda t=t: t(x), exclude=there) for t in (low, whole))
    assert few == 4 * 512 * 4 * 4 < many / 10


# --- every way to call -----------------------------------------------------------------------


@forms
@pytest.mark.parametrize("name", ["vit", "einsum", "not seen"])
def test_checkpointing(name, form):
    if name == "vit":
        model, x = vit().double(), images().double()
    else:
        torch.manual_seed(3)
        call, parts, _ = USES[name]
        block = Computes(lambda m, x: m.inner(x), inner=Computes(call, **parts()))
        model, x = nn.Sequential(block).double(), tokens()
    tangent = moved(linearize(model, **FORMS[form], check=name != "not seen"))
    if name == "not seen":  # as the check at the first call would find out
        tangent._multiplies = True
    plain = torch.autograd.grad(tangent(x).square().sum(), list(tangent.deltas().values()))
    tangent.set_grad_checkpointing()
    again = torch.autograd.grad(tangent(x).square().sum(), list(tangent.deltas().values()))
    assert_near(again, plain, 1e-12)
    assert_right(tangent, model, x)


@forms
def test_a_repeated_block_counts_what_modes_do_not_see(form):
    """The repeated pass is an ordinary one: what gets the weight itself gives its gradient."""
    torch.manual_seed(3)
    call, parts, _ = USES["not seen"]
    inner = Computes(lambda m, x: call(m, x) * F.linear(x, m.weight), **parts())
    model = nn.Sequential(Computes(lambda m, x: m.inner(x), inner=inner)).double()
    tangent = linearize(model, **FORMS[form], check=False)
    tangent.set_grad_checkpointing()
    output = tangent(tokens())
    assert output.isnan().all()  # without the check, which would multiply out
    cotangent = tokens(*output.shape, seed=4)
    found = torch.autograd.grad(output, list(tangent.deltas().values()), cotangent)
    exact = exact_vjp(model, list(tangent.deltas()), cotangent, tokens())
    assert_near(dict(zip(tangent.deltas(), found, strict=True)), by_delta(tangent, exact), 1e-11)


@pytest.mark.parametrize(
    ("how", "form"),
    [*itertools.product(["vmap", "functional_call", "jvp", "grad"], FORMS), ("compiled", "core")],
)
def test_transforms(how, form):
    model, x = vit(depth=1).double(), images().double()
    tangent = moved(linearize(model, **FORMS[form]))
    exact = sum(exact_jvp(model, full(tangent), x))
    deltas = {f"delta.{n}": d.detach() for n, d in tangent.deltas().items()}

    def call(scale):
        scaled = {n: scale * d for n, d in deltas.items()}
        return torch.func.functional_call(tangent, scaled, (x,))

    one = torch.ones((), dtype=torch.float64)
    anchor = exact_jvp(model, full(tangent), x)[0]
    if how == "vmap":
        assert_near(torch.func.vmap(lambda image: tangent(image[None])[0])(x), exact, 1e-11)
    elif how == "functional_call":
        assert_near(call(2 * one), 2 * exact - anchor, 1e-11)
    elif how == "jvp":  # forward over forward
        assert_near(torch.func.jvp(call, (one,), (one,)), (exact, exact - anchor), 1e-11)
    elif how == "grad":
        assert_near(torch.func.grad(lambda s: call(s).sum())(one), (exact - anchor).sum(), 1e-11)
    else:
        found = torch.compile(tangent, fullgraph=True, backend="aot_eager")(x)
        assert_near(found, exact, 1e-11)


@forms
@pytest.mark.parametrize("name", ["linear", "heads", "convolution", "einsum"])
def test_gradients_by_the_anchor_and_double_backward(name, form):
    """Gradients by the weights and the input of J(x) Δw, and by the cotangent of a gradient."""
    model, _ = use(name)
    tangent = moved(linearize(model, **FORMS[form], check=False))
    x = tokens(2, 8, 8)
    weights = {n: p.detach().clone() for n, p in tangent.anchor.named_parameters()}
    exact_model = Computes(*[USES[name][0]], **USES[name][1]()).double()
    directions = full(tangent)

    def slope(weights, x):
        run = lambda w: torch.func.functional_call(exact_model, w, (x,))  # noqa: E731
        return torch.func.jvp(run, (weights,), (directions,))[1].sin().sum()

    def ours(weights, x):
        for parameter in tangent.anchor.parameters():
            parameter.requires_grad_()
        named = {f"anchor.{n}": w for n, w in weights.items()}
        pair = torch.func.functional_call(
            Pair(tangent), {f"tangent.{n}": w for n, w in named.items()}, (x,)
        )
        return pair[1].sin().sum()

    exact = torch.func.grad(slope, argnums=(0, 1))(weights, x)
    leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
    x = x.clone().requires_grad_()
    found = torch.autograd.grad(ours(leaves, x), [*leaves.values(), x], allow_unused=True)
    right = [*exact[0].values(), exact[1]]
    pairs = [(f, r) for f, r in zip(found, right, strict=True) if float(r.abs().max()) > 0]
    assert_near([f for f, _ in pairs], [r for _, r in pairs], 1e-10)

    deltas = list(tangent.deltas().values())
    frozen = moved(linearize(model, **FORMS[form], check=False))
    deltas = list(frozen.deltas().values())
    cotangent = torch.randn_like(frozen(x.detach())).requires_grad_()
    first = torch.autograd.grad(frozen(x.detach()), deltas, cotangent, create_graph=True)
    noise = [torch.randn(g.shape, generator=generator(9), dtype=g.dtype) for g in first]
    second = torch.autograd.grad(first, cotangent, noise)[0]  # J times the noise
    with torch.no_grad():
        for delta, each in zip(deltas, noise, strict=True):
            delta.copy_(each)
    assert_near(second, exact_jvp(model, full(frozen), x.detach())[1], 1e-10)


class Pair(nn.Module):
    def __init__(self, tangent):
        super().__init__()
        self.tangent = tangent

    def forward(self, *args):
        return self.tangent.primal_and_tangent(*args)


def test_split_and_export(tmp_path):
    model, x = vit().double(), images().double()
    tangent = moved(linearize(model, last_blocks(model, 1), **FORMS["core"]))
    trunk, tail = tangent.split()
    assert_near(tail(trunk(x)), tangent(x).detach(), 1e-12)
    assert_right(tangent, model, x)
    export_program(tangent, tmp_path / "model.pt2", input_size=(3, 16, 16))
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert_near(program(x), tangent(x), 1e-11)


@forms
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_sixteen_bits(how, form):
    """As near to float64 as full deltas are."""
    x = images()
    errors = []
    exact = None
    for options in (FORMS[form], {}):
        model = vit(depth=1) if how == "autocast" else vit(depth=1).bfloat16()
        tangent = linearize(model, **options, check=False)
        if exact is None:
            moved(tangent, scale=0.1)
            whole = tangent.full_delta_dict()
            exact = exact_jvp(model, full(tangent), x.to(next(model.parameters()).dtype))[1]
        else:
            tangent.load_delta_dict(whole)
        assert all(delta.dtype == torch.float32 for delta in tangent.deltas().values())
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found = tangent.primal_and_tangent(x.to(next(model.parameters()).dtype))[1].detach()
        errors.append(float((found.double() - exact).norm() / exact.norm()))
    assert errors[0] <= 2 * errors[1] + 2**-8


# --- nothing is lost -------------------------------------------------------------------------


def test_a_function_that_modes_do_not_see_never_gives_a_number():
    model, _ = use("not seen")
    unchecked = moved(linearize(model, rank=2, check=False))
    assert unchecked(tokens()).isnan().all()
    checked = moved(linearize(model, rank=2))
    assert checked(tokens()).isfinite().all() and checked._multiplies


@pytest.mark.parametrize("name", ["linear", "heads", "convolution"])
def test_the_check_finds_a_lost_tangent(name, monkeypatch):
    """Layers that lose the tangent of a factor: the model multiplies out, and is right."""
    for layer in ("factored_linear", "factored_head_linear", "factored_convolution"):
        right = getattr(factored_calls, layer)

        def without(*args, right=right, **kwargs):
            return right(*map(still, args), **{n: still(x) for n, x in kwargs.items()})

        monkeypatch.setattr(factored_calls, layer, without)
    model, _ = use(name)
    unchecked, checked = (moved(linearize(model, rank=2, check=on)) for on in (False, True))
    exact = exact_jvp(model, full(checked), tokens())
    assert_near(checked.primal_and_tangent(tokens()), exact, 1e-11)
    assert checked._multiplies
    with pytest.raises(AssertionError):
        assert_near(unchecked.primal_and_tangent(tokens()), exact, 1e-11)


def still(value: Any) -> Any:
    if not isinstance(value, Factors):
        return value
    return value._replace(trained=torch.zeros_like(value.trained))
