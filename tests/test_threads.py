"""Linearized models and dual operations in several threads: PyTorch has one level for them all."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

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
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._functorch.eager_transforms import jvp_increment_nesting
from torch.autograd import forward_ad

import tangent_ops
from tangent_ops import (
    LinearizedModel,
    _levels,
    functional,
    fused_forward_ad,
    last_blocks,
    linearize,
)
from tangent_ops.errors import UnsupportedError
from tangent_ops.exact._jacobian import Pair
from tangent_ops.functional._backend import in_forward_ad
from tangent_ops.privacy._taps import Pass

HANGS = 60.0  # seconds that no thread here takes


@pytest.fixture(autouse=True)
def busy_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
    assert forward_ad._current_level == -1
    call = run(lambda: small()[0](small()[1]))  # no lock is left behind, nor a level
    assert call == []


def small(seed: int = 0) -> tuple[LinearizedModel, Tensor, Tensor, Tensor]:
    """A model, an input, and what its primal and tangent are, in float64."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    tangent = moved(linearize(model), seed, scale=1.0)
    x = torch.randn(2, 6, generator=generator(seed))
    return tangent, x, *exact_jvp(model, tangent.deltas(), x)


def run(*functions: Callable[[], object]) -> list[BaseException]:
    """Each in a thread of its own; what they raised."""
    raised: list[BaseException] = []

    def guarded(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANGS)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return raised


def again_until(stop: Callable[[], bool], function: Callable[[], object]) -> Callable[[], None]:
    def repeated() -> None:
        while not stop():
            function()

    return repeated


def for_seconds(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@contextlib.contextmanager
def elsewhere(context: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
    """With another thread inside of that context."""
    inside, done = threading.Event(), threading.Event()

    def stay() -> None:
        with context():
            inside.set()
            assert done.wait(HANGS)

    thread = threading.Thread(target=stay, daemon=True)
    thread.start()
    assert inside.wait(HANGS)
    try:
        yield
    finally:
        done.set()
        thread.join(HANGS)


class Waiting(nn.Module):
    """Calls a function in the middle of its forward pass."""

    def __init__(self, function: Callable[[], object]):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.function = [function]  # not copied with the module

    def __deepcopy__(self, memo):
        copy = Waiting(self.function[0])
        copy.linear.load_state_dict(self.linear.state_dict())
        return copy

    def forward(self, x: Tensor) -> Tensor:
        output = self.linear(x)
        self.function[0]()
        return output


@contextlib.contextmanager
def linearized_call_elsewhere() -> Iterator[None]:
    """With another thread in the middle of a linearized call."""
    inside, done = threading.Event(), threading.Event()
    tangent = linearize(Waiting(lambda: (inside.set(), done.wait(HANGS))))
    thread = threading.Thread(target=lambda: tangent(torch.ones(2, 6)), daemon=True)
    thread.start()
    assert inside.wait(HANGS)
    try:
        yield
    finally:
        done.set()
        thread.join(HANGS)


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
            found = _levels.functional_call(pair, doubled, (x,))
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


@contextlib.contextmanager
def in_a_jvp() -> Iterator[None]:
    """A block in a thread's own torch.func.jvp."""
    with (
        jvp_increment_nesting(),
        forward_ad.dual_level(),
    ):
        yield


@pytest.mark.parametrize("level", [forward_ad.dual_level, in_a_jvp])
def test_a_level_of_another_thread_is_refused(level) -> None:
    tangent, x, primal, primal_t = small()
    x_t = torch.ones_like(x)
    with elsewhere(level):
        with pytest.raises(UnsupportedError, match=r"another\s+thread's.*fused_forward_ad"):
            tangent(x)
        with pytest.raises(UnsupportedError, match=r"another\s+thread's"):
            torch.func.vmap(tangent)(x)
        if level is in_a_jvp:  # PyTorch would let these share its level
            with pytest.raises(UnsupportedError, match=r"another\s+thread's"):
                torch.func.jvp(tangent, (x,), (x_t,))
            with pytest.raises(UnsupportedError, match=r"another\s+thread's"), fused_forward_ad():
                pass
    assert_near(tangent.primal_and_tangent(x), (primal, primal_t))


def test_levels_of_the_same_thread() -> None:
    tangent, x, *_ = small()
    with forward_ad.dual_level():
        with pytest.raises(UnsupportedError, match=r"dual_level\(\) around the call"):
            tangent(x)
        assert forward_ad._current_level == 0
        assert forward_ad.unpack_dual(forward_ad.make_dual(x, x)).tangent is not None
    outer = linearize(Around(tangent))
    with pytest.raises(UnsupportedError, match=r"cannot nest"):
        outer(x)


class Around(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_long_block_of_another_thread(monkeypatch) -> None:
    monkeypatch.setattr(_levels, "PATIENCE", 0.1)
    tangent, x, primal, primal_t = small()
    with elsewhere(fused_forward_ad):
        for call in (lambda: tangent(x), lambda: fused_forward_ad().__enter__()):
            with pytest.raises(UnsupportedError, match=r"more than 0\.1 s.*one forward pass"):
                call()
    assert_near(tangent.primal_and_tangent(x), (primal, primal_t))


def test_a_backward_pass_does_not_wait_for_blocks() -> None:
    """On a GPU it is another thread's, for which the one in the block waits."""
    tangent = moved(linearize(vit(depth=2)))
    tangent.set_grad_checkpointing()
    output = tangent(images()).sum()
    with elsewhere(fused_forward_ad):
        assert run(output.backward) == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_errors_leave_nothing(error: type[BaseException]) -> None:
    def fail() -> None:
        if failing:
            raise error

    failing = False
    tangent = linearize(Waiting(fail))
    failing = True
    x = torch.ones(2, 6)
    for call in (tangent, torch.func.vmap(tangent), torch.func.grad(lambda x: tangent(x).sum())):
        with pytest.raises(error):
            call(x)
        assert forward_ad._current_level == -1
        assert run(lambda: small()[0](small()[1])) == []
    with pytest.raises(error), fused_forward_ad():
        fail()


def test_interrupts_at_any_moment_leave_no_level() -> None:
    tangent, x, primal, primal_t = small()
    me, interrupts = threading.main_thread().ident, 0
    assert me == threading.get_ident()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        stop, delay = for_seconds(1), generator()
        while not stop():
            try:
                wait = 1e-4 + 2e-3 * float(torch.rand((), generator=delay))
                signal.setitimer(signal.ITIMER_REAL, wait)
                _levels.in_own_level(lambda: forward_ad.make_dual(x, x).sin())
                while True:
                    _levels.in_own_level(lambda: None)
            except KeyboardInterrupt:
                interrupts += 1
            assert forward_ad._current_level == -1
            assert run(lambda: _levels.in_own_level(lambda: None)) == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 10
    assert_near(tangent.primal_and_tangent(x), (primal, primal_t))


@pytest.mark.parametrize("other", ["calls", "block"])
def test_a_forked_child_calls(other: str) -> None:
    tangent, x, primal, primal_t = small()

    def call() -> None:
        with torch.no_grad():
            assert_near(tangent.primal_and_tangent(x), (primal, primal_t))

    done = threading.Event()
    calls = threading.Thread(target=again_until(done.is_set, call), daemon=True)
    context = elsewhere(fused_forward_ad) if other == "block" else contextlib.nullcontext()
    try:
        with context:
            if other == "calls":
                calls.start()
            for _ in range(5):
                child = os.fork()
                if child == 0:
                    signal.alarm(20)
                    try:
                        call()
                        os._exit(0)
                    finally:
                        os._exit(1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        done.set()
        if other == "calls":
            calls.join(HANGS)
