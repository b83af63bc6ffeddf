"""Threads that call linearized models, train them and run other things: every number is right."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    RightLayerNorm,
    assert_near,
    exact_jvp,
    exact_vjp,
    generator,
    images,
    moved,
    vit,
)
from threaded import (
    again_until,
    busy_switching,  # noqa: F401 - around every test
    for_seconds,
    linearized_call_elsewhere,
    run,
    small,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.autograd import forward_ad

import tangent_ops
from tangent_ops import functional, fused_forward_ad, last_blocks, linearize
from tangent_ops.errors import UnsupportedError
from tangent_ops.exact.jacobian import Pair
from tangent_ops.ops import levels as _threads
from tangent_ops.ops.backend import in_forward_ad
from tangent_ops.ops.levels import is_compiling
from tangent_ops.privacy.per_sample.taps import Pass


def test_eight_threads_serve_one_model() -> None:
    tangent, x, primal, primal_t = small()
    counts = [0] * 8
    stop = for_seconds(5)

    def serve(k: int) -> None:
        while not stop():
            with torch.no_grad():
                found = tangent.primal_and_tangent(x)
            assert_near(found, (primal, primal_t))
            counts[k] += 1

    assert run(*(lambda k=k: serve(k) for k in range(8))) == []
    assert min(counts) > 0
    assert_near(tangent.primal_and_tangent(x), (primal, primal_t))


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_threads_under_other_transforms(transform: str) -> None:
    """There a call opens its level by torch.func.jvp, or nests in the thread's own."""
    tangent, x, primal, primal_t = small()
    x_t = torch.ones_like(x)
    exact = tangent.anchor
    stop = for_seconds(1)

    def serve() -> None:
        with torch.no_grad():
            if transform == "vmap":
                assert_near(torch.func.vmap(tangent)(x), primal + primal_t)
                return
            with fused_forward_ad():
                found = torch.func.jvp(tangent, (x,), (x_t,))
        assert_near(found, right)

    double = [d.double() for d in (x, x_t)]
    deltas = {name: delta.double() for name, delta in tangent.deltas().items()}
    oracle = linear_by_torch(exact, deltas)
    with RightLayerNorm():
        right = torch.func.jvp(oracle, (double[0],), (double[1],))
    right = tuple(y.detach() for y in right)
    assert run(*[again_until(stop, serve)] * 4) == []


def linear_by_torch(model: nn.Module, deltas: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """f + J Δ by PyTorch's own transform, in float64."""
    weights = {n: p.detach().double() for n, p in model.named_parameters()}

    def run(x: Tensor) -> Tensor:
        value, slope = torch.func.jvp(
            lambda w: torch.func.functional_call(model, w, (x,)), (weights,), (deltas,)
        )
        return value + slope

    return run


def test_two_models_train_in_two_threads() -> None:
    stop = for_seconds(1)

    def training(seed: int) -> Callable[[], None]:
        tangent, x, *_ = small(seed)
        cotangent = torch.randn(2, 3, generator=generator(seed + 1))
        exact = exact_vjp(tangent.anchor, list(tangent.deltas()), cotangent, x)

        def step() -> None:
            grads = torch.autograd.grad(tangent(x), list(tangent.deltas().values()), cotangent)
            assert_near(grads, list(exact.values()))

        return again_until(stop, step)

    assert run(training(0), training(1)) == []


def test_one_model_trains_with_checkpointing_and_serves() -> None:
    """The backward pass puts tensors in the place of the anchor's parameters, to run blocks."""
    model, x = vit(depth=2), images()
    tangent = moved(linearize(model))
    tangent.set_grad_checkpointing()
    cotangent = torch.randn(2, 5, generator=generator(4))
    exact = list(exact_vjp(model, list(tangent.deltas()), cotangent, x).values())
    right = exact_jvp(model, tangent.deltas(), x)
    stop = for_seconds(1)

    def train() -> None:
        grads = torch.autograd.grad(tangent(x), list(tangent.deltas().values()), cotangent)
        assert_near(grads, exact)

    def serve() -> None:
        with torch.no_grad():
            assert_near(tangent.primal_and_tangent(x), right)

    assert run(again_until(stop, train), again_until(stop, serve)) == []


def test_other_deltas_in_one_thread_are_not_seen_in_another() -> None:
    """As in exact fits, which take J times any direction."""
    tangent, x, primal, primal_t = small()
    doubled = {f"tangent.delta.{n}": 2 * d.detach() for n, d in tangent.deltas().items()}
    pair = Pair(tangent)
    stop = for_seconds(1)

    def fit() -> None:
        with torch.no_grad():
            found = _threads.functional_call(pair, doubled, (x,))
        assert_near(found, (primal, 2 * primal_t))

    def serve() -> None:
        with torch.no_grad():
            assert_near(tangent.primal_and_tangent(x), (primal, primal_t))

    assert run(again_until(stop, fit), again_until(stop, serve)) == []


def test_features_and_hooks_of_one_thread_are_not_those_of_another() -> None:
    """The trunk stops the anchor by a hook; per-sample gradients listen to its layers."""
    model, x = vit(depth=2), images()
    tangent = moved(linearize(model, last_blocks(model, 1)))
    trunk, _ = tangent.split()
    with torch.no_grad():
        tokens = oracle_tokens(model, x)
    right = exact_jvp(model, tangent.deltas(), x)
    layers = {"head": tangent.anchor.get_submodule("head")}
    stop = for_seconds(1)

    def features() -> None:
        assert_near(trunk(x), tokens)

    def gradients() -> None:
        assert [len(calls) for calls in Pass(tangent, layers, x).calls.values()] == [1]

    def serve() -> None:
        with torch.no_grad():
            assert_near(tangent.primal_and_tangent(x), right)

    assert run(*[again_until(stop, f) for f in (features, gradients, serve)]) == []


def oracle_tokens(model: VisionTransformer, x: Tensor) -> Tensor:
    """What enters the last of two blocks, in float64."""
    exact = copy.deepcopy(model).double().eval()
    exact.blocks[1], exact.norm = nn.Identity(), nn.Identity()
    return exact.forward_features(x.double())


def test_models_are_linearized_in_several_threads() -> None:
    """Their check opens a level, and silences warnings in all of the process for a while."""
    before = list(warnings.filters)
    stop = for_seconds(1)

    def make() -> None:
        tangent = linearize(nn.Linear(6, 3), example=torch.ones(2, 6))
        assert tangent(torch.ones(2, 6)).shape == (2, 3)

    assert run(*[again_until(stop, make)] * 4) == []
    assert list(warnings.filters) == before


def test_deltas_of_one_thread_are_not_read_in_another() -> None:
    tangent, x, *_ = small()
    doubled = {f"tangent.delta.{n}": 2 * d.detach() for n, d in tangent.deltas().items()}
    right, pair = tangent.delta_dict(), Pair(tangent)
    stop = for_seconds(1)

    def read() -> None:
        assert all(torch.equal(d, right[n]) for n, d in tangent.delta_dict().items())

    def fit() -> None:
        _threads.functional_call(pair, doubled, (x,))

    assert run(again_until(stop, fit), again_until(stop, read)) == []


def test_compiling_in_one_thread_is_not_compiling_in_another(monkeypatch) -> None:
    """PyTorch's flag says so in every thread; calls would open levels as traced code does."""
    tangent, x, primal, primal_t = small()

    def serve() -> None:
        assert torch.compiler.is_compiling() and not is_compiling()
        with torch.no_grad():
            assert_near(tangent.primal_and_tangent(x), (primal, primal_t))

    def backend(graph, _inputs):
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # as from torch 2.14 on
        assert run(serve, serve, serve) == []
        monkeypatch.undo()
        return graph

    compiled = torch.compile(lambda x: (is_compiling(), x.sin()), backend=backend, fullgraph=True)
    assert compiled(x)[0]
    assert not is_compiling()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own vmap
def test_plain_operations_beside_a_linearized_call() -> None:
    """Nothing here has a tangent: all is PyTorch's own, to the bit."""
    q, k, v = torch.randn(3, 2, 3, 5, 8, generator=generator())
    x, weight = torch.randn(2, 4, 4, generator=generator(1))

    def values() -> list[Tensor]:
        with torch.no_grad():
            return [
                tangent_ops.scaled_dot_product_attention(q, k, v),
                torch.func.vmap(tangent_ops.scaled_dot_product_attention)(q, k, v),
                functional.linear(x, weight),
                functional.layer_norm(x, (4,), weight[0]),
            ]

    attention = F.scaled_dot_product_attention
    right = values()
    assert torch.equal(right[0], attention(q, k, v))
    with linearized_call_elsewhere():
        assert forward_ad._current_level >= 0
        assert not in_forward_ad()
        assert all(map(torch.equal, values(), right))


def test_plain_operations_while_levels_come_and_go() -> None:
    tangent, x, primal, primal_t = small()
    q, k, v = torch.randn(3, 2, 3, 5, 8, generator=generator())
    right = F.scaled_dot_product_attention(q, k, v)
    stop = for_seconds(1)

    def plain() -> None:
        assert torch.equal(tangent_ops.scaled_dot_product_attention(q, k, v), right)

    def serve() -> None:
        with torch.no_grad():
            assert_near(tangent.primal_and_tangent(x), (primal, primal_t))

    assert run(*[again_until(stop, f) for f in (plain, plain, serve)]) == []


def test_a_backward_pass_in_another_thread_has_part_in_the_level() -> None:
    """As PyTorch's threads of GPUs have in the level of the one that waits for them."""
    seen = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            seen.append(in_forward_ad())
            return grads[0]

    with linearized_call_elsewhere():
        Looks.apply(torch.ones(1, requires_grad=True)).backward()
    assert seen == [True]


def test_fused_blocks_with_levels_of_their_own() -> None:
    model, x, x_t = vit(depth=1).eval(), images(), images(seed=2)
    exact = model.double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        right = torch.func.jvp(exact, (x.double(),), (x_t.double(),))
    right = tuple(y.detach() for y in right)
    model = model.float()
    tangent, z, primal, primal_t = small()
    stop = for_seconds(1)

    def by_jvp() -> None:
        with fused_forward_ad():
            assert_near(torch.func.jvp(model, (x,), (x_t,)), right)

    def by_level() -> None:
        with fused_forward_ad(), forward_ad.dual_level():
            output = model(forward_ad.make_dual(x, x_t))
            assert_near(tuple(forward_ad.unpack_dual(output)), right)

    def serve() -> None:
        assert_near(tangent.primal_and_tangent(z), (primal, primal_t))

    assert run(*[again_until(stop, f) for f in (by_jvp, by_level, by_jvp, serve)]) == []


def test_a_jvp_of_pytorchs_alone_beside_linearized_calls() -> None:
    """Outside of fused_forward_ad() one of the two may be refused; no number is wrong."""
    tangent, x, primal, primal_t = small()
    z, z_t = torch.randn(2, 3, generator=generator(1))
    right = z_t * z.cos()
    stop = for_seconds(1)
    counts = {"ours": 0, "theirs": 0}

    def serve() -> None:
        with torch.no_grad(), contextlib.suppress(UnsupportedError):
            assert_near(tangent.primal_and_tangent(x), (primal, primal_t))
            counts["ours"] += 1

    def theirs() -> None:
        try:
            found = torch.func.jvp(torch.sin, (z,), (z_t,))[1]
        except RuntimeError as error:  # PyTorch's: a level of ours is open
            assert "Nested forward mode AD" in str(error)
        else:
            assert torch.allclose(found, right)
            counts["theirs"] += 1

    assert run(*[again_until(stop, f) for f in (serve, theirs)]) == []
    assert min(counts.values()) > 0
    assert_near(tangent.primal_and_tangent(x), (primal, primal_t))
