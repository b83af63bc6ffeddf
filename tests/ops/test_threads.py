"""Threads that call and train linearized models beside others: every number is right."""

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
    busy_switching,  # noqa: F401 - around every test
    calling,
    for_seconds,
    linearized_call_elsewhere,
    run,
    run_for_a_second,
    small,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.autograd import forward_ad

import tangent_ops
from tangent_ops import functional, fused_forward_ad, last_blocks, linearize
from tangent_ops.errors import UnsupportedError
from tangent_ops.exact.jacobian import Pair
from tangent_ops.ops import levels
from tangent_ops.ops.backend import in_forward_ad


def test_eight_threads_serve_one_model() -> None:
    *_, call = small()
    counts = [0] * 8
    stop = for_seconds(5)

    def serve(k: int) -> None:
        while not stop():
            call()
            counts[k] += 1

    assert run(*(lambda k=k: serve(k) for k in range(8))) == []
    assert min(counts) > 0
    call()


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_threads_under_other_transforms(transform: str) -> None:
    """There a call opens its level by torch.func.jvp, or nests in the level of its thread."""
    tangent, x, (primal, primal_t), _ = small()
    x_t = torch.ones_like(x)
    deltas = {name: delta.detach().double() for name, delta in tangent.deltas().items()}
    weights = {n: p.detach().double() for n, p in tangent.anchor.named_parameters()}

    def exact(x: Tensor) -> Tensor:
        """f + J Δ by PyTorch's own transform, in float64."""

        def of_weights(w: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(tangent.anchor, w, (x,))

        return torch.add(*torch.func.jvp(of_weights, (weights,), (deltas,)))

    with RightLayerNorm():
        right = torch.func.jvp(exact, (x.double(),), (x_t.double(),))

    def serve() -> None:
        with torch.no_grad():
            if transform == "vmap":
                assert_near(torch.func.vmap(tangent)(x), primal + primal_t)
                return
            with fused_forward_ad():
                found = torch.func.jvp(tangent, (x,), (x_t,))
        assert_near(found, right)

    run_for_a_second(*[serve] * 4)


def test_two_models_train_in_two_threads() -> None:
    def training(seed: int) -> Callable[[], None]:
        tangent, x, *_ = small(seed)
        cotangent = torch.randn(2, 3, generator=generator(seed + 1))
        exact = exact_vjp(tangent.anchor, list(tangent.deltas()), cotangent, x)

        def step() -> None:
            grads = torch.autograd.grad(tangent(x), list(tangent.deltas().values()), cotangent)
            assert_near(grads, list(exact.values()))

        return step

    run_for_a_second(training(0), training(1))


def test_one_model_trains_with_checkpointing_and_serves() -> None:
    """The backward pass swaps the anchor's parameters for tensors while it repeats blocks."""
    model, x = vit(depth=2), images()
    tangent = moved(linearize(model))
    tangent.set_grad_checkpointing()
    cotangent = torch.randn(2, 5, generator=generator(4))
    exact = list(exact_vjp(model, list(tangent.deltas()), cotangent, x).values())

    def train() -> None:
        grads = torch.autograd.grad(tangent(x), list(tangent.deltas().values()), cotangent)
        assert_near(grads, exact)

    run_for_a_second(train, calling(tangent, x, exact_jvp(model, tangent.deltas(), x)))


def test_other_deltas_in_one_thread_are_not_seen_in_another() -> None:
    """Exact fits call the model with other deltas, for J times any direction."""
    tangent, x, (primal, primal_t), serve = small()
    doubled = {f"tangent.delta.{n}": 2 * d.detach() for n, d in tangent.deltas().items()}
    right, pair = tangent.delta_dict(), Pair(tangent)

    def fit() -> None:
        with torch.no_grad():
            found = levels.functional_call(pair, doubled, (x,))
        assert_near(found, (primal, 2 * primal_t))

    def read() -> None:
        assert all(torch.equal(d, right[n]) for n, d in tangent.delta_dict().items())

    run_for_a_second(fit, serve)
    run_for_a_second(fit, read)


def test_features_and_hooks_of_one_thread_are_not_those_of_another() -> None:
    """The trunk stops the anchor by a hook; per-sample gradients hook its layers."""
    taps = pytest.importorskip("tangent_ops.privacy.per_sample.taps", exc_type=ImportError)
    model, x = vit(depth=2), images()
    tangent = moved(linearize(model, last_blocks(model, 1)))
    trunk, _ = tangent.split()
    with torch.no_grad():
        tokens = oracle_tokens(model, x)
    serve = calling(tangent, x, exact_jvp(model, tangent.deltas(), x))
    layers = {"head": tangent.anchor.get_submodule("head")}

    def features() -> None:
        assert_near(trunk(x), tokens)

    def gradients() -> None:
        assert [len(calls) for calls in taps.Pass(tangent, layers, x).calls.values()] == [1]

    run_for_a_second(features, gradients, serve)


def oracle_tokens(model: VisionTransformer, x: Tensor) -> Tensor:
    """What enters the last of two blocks, in float64."""
    exact = copy.deepcopy(model).double().eval()
    exact.blocks[1], exact.norm = nn.Identity(), nn.Identity()
    return exact.forward_features(x.double())


def test_models_are_linearized_in_several_threads() -> None:
    """The check of a model opens a level, and filters warnings in the whole process meanwhile."""
    before = list(warnings.filters)

    def make() -> None:
        tangent = linearize(nn.Linear(6, 3), example=torch.ones(2, 6))
        assert tangent(torch.ones(2, 6)).shape == (2, 3)

    run_for_a_second(*[make] * 4)
    assert list(warnings.filters) == before


def test_compiling_in_one_thread_is_not_compiling_in_another(monkeypatch) -> None:
    """PyTorch's flag holds for all threads: calls would open their levels as traced code does."""
    _, x, _, call = small()

    def serve() -> None:
        assert torch.compiler.is_compiling() and not levels.is_compiling()
        call()

    def backend(graph, _inputs):
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # as from torch 2.14 on
        assert run(serve, serve, serve) == []
        monkeypatch.undo()
        return graph

    compiled = torch.compile(
        lambda x: (levels.is_compiling(), x.sin()), backend=backend, fullgraph=True
    )
    assert compiled(x)[0]
    assert not levels.is_compiling()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own vmap
def test_plain_operations_beside_a_linearized_call() -> None:
    """No operand has a tangent: every result is PyTorch's own, bit for bit."""
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
    q, k, v = torch.randn(3, 2, 3, 5, 8, generator=generator())
    right = F.scaled_dot_product_attention(q, k, v)

    def plain() -> None:
        assert torch.equal(tangent_ops.scaled_dot_product_attention(q, k, v), right)

    run_for_a_second(plain, plain, small()[-1])


def test_a_backward_pass_in_another_thread_has_part_in_the_level() -> None:
    """On a GPU, PyTorch's backward threads share the level of the thread that waits for them."""
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
    tangent, z, exact_z, _ = small()

    def by_jvp() -> None:
        with fused_forward_ad():
            assert_near(torch.func.jvp(model, (x,), (x_t,)), right)

    def by_level() -> None:
        with fused_forward_ad(), forward_ad.dual_level():
            output = model(forward_ad.make_dual(x, x_t))
            assert_near(tuple(forward_ad.unpack_dual(output)), right)

    def serve() -> None:
        assert_near(tangent.primal_and_tangent(z), exact_z)

    run_for_a_second(by_jvp, by_level, by_jvp, serve)


def test_a_jvp_of_pytorchs_alone_beside_linearized_calls() -> None:
    """Outside of fused_forward_ad() either may be refused, but no result is wrong."""
    *_, call = small()
    z, z_t = torch.randn(2, 3, generator=generator(1))
    right = z_t * z.cos()
    counts = {"ours": 0, "theirs": 0}

    def serve() -> None:
        with contextlib.suppress(UnsupportedError):
            call()
            counts["ours"] += 1

    def theirs() -> None:
        try:
            found = torch.func.jvp(torch.sin, (z,), (z_t,))[1]
        except RuntimeError as error:  # PyTorch's: a level of ours is open
            assert "Nested forward mode AD" in str(error)
        else:
            assert torch.allclose(found, right)
            counts["theirs"] += 1

    run_for_a_second(serve, theirs)
    assert min(counts.values()) > 0
    call()
