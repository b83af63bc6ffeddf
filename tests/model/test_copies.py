"""The anchor shares nothing with the model, whatever functions are kept on instances."""

from __future__ import annotations

import functools
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from small_models import assert_near, exact_jvp, exact_vjp, generator, moved
from torch import Tensor, nn
from torch.nn.utils import prune

from tangent_ops import linearize
from tangent_ops.errors import UnsupportedError

X = torch.randn(3, 4, generator=generator(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))


def compiled(m):
    m.forward = torch.compile(m.forward, backend="eager")


def wrapped(m):
    forward = m.forward

    @functools.wraps(forward)
    def call(*args):
        return forward(*args)

    m.forward = call


def closure(m):
    m.forward = lambda x: m[2](m[1](m[0](x)))


def decorated(m):
    m.forward = torch.enable_grad()(m.forward)


def autocast(m):
    m.forward = torch.autocast("cpu", enabled=False)(m.forward)


def hook_with_a_module(m):
    m[0].register_forward_hook(lambda module, inputs, output: output + m[2].weight.mean())


def pre_hook_with_a_parameter(m):
    bias = m[0].bias
    m[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + bias,))


def parameter(m):
    weight = m[0].weight
    m.forward = lambda x: m[2](F.linear(x, weight))


def default(m):
    m.forward = lambda x, own=m: own[2](own[0](x))


def keyword_default(m):
    m.forward = lambda x, *, own=m: own[2](own[0](x))


def partial(m):
    m.forward = functools.partial(lambda own, x: own[2](own[0](x)), m)


def method(m):
    m.forward = types.MethodType(lambda self, x: self[2](self[0](x)), m)


def weak(m):
    m.parent = weakref.ref(m[2])
    m.forward = lambda x: m.parent()(m[0](x))


def in_a_list(m):
    m.calls = [lambda x: m[0](x), (lambda x: m[2](x),)]
    m.forward = lambda x: m.calls[1][0](m.calls[0](x))


def recursive(m):
    def call(x, depth=1):
        return m[2](m[0](x)) if depth == 0 else call(x, depth - 1)

    m.forward = call


def of_a_global(m):
    names = {"m": m}
    exec("def forward(x):\n    return m[2](m[0](x))", names)
    m.forward = names["forward"]


KINDS = [
    compiled, wrapped, closure, decorated, autocast, hook_with_a_module, pre_hook_with_a_parameter,
    default, keyword_default, partial, method, weak, in_a_list, recursive, of_a_global,
]  # fmt: skip


class Plain(nn.Module):
    """The same function of the same parameters, by forward methods of classes."""

    def __init__(self, m: nn.Module, call) -> None:
        super().__init__()
        self.m, self.call = m, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.m, x)


def plainly(m, x):
    return m[2](m[0](x))


WHAT_IT_COMPUTES = {
    hook_with_a_module: lambda m, x: m[2](m[1](m[0](x) + m[2].weight.mean())),
    pre_hook_with_a_parameter: lambda m, x: m[2](m[1](m[0](x)) + m[0].bias),
    **{kind: (lambda m, x: m[2](m[1](m[0](x)))) for kind in KINDS[:5]},
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_functions_on_instances_belong_to_the_copy(kind):
    original = model()
    plain = Plain(model(), WHAT_IT_COMPUTES.get(kind, plainly))
    kind(original)
    with torch.no_grad():
        names = ["0.weight", "2.weight"]
        tangent = moved(linearize(original, lambda name: name in names, example=X))
        for weight in original.parameters():  # later changes do not reach the copy
            weight.fill_(7.0)
    primal, tangent_of_it = tangent.primal_and_tangent(X)
    deltas = {f"m.{name}": delta for name, delta in tangent.deltas().items()}
    assert_near((primal, tangent_of_it), exact_jvp(plain, deltas, X))
    cotangent = torch.randn(3, 3, generator=generator(2))
    grads = torch.autograd.grad(tangent(X), list(tangent.deltas().values()), cotangent)
    exact = exact_vjp(plain, list(deltas), cotangent, X)
    assert_near(dict(zip(deltas, grads, strict=True)), exact)


def cached(m):
    m.cached = functools.lru_cache(m.forward)


def box(m):
    inside = [m]
    m.forward = lambda x: inside[0][2](inside[0][0](x))


@pytest.mark.parametrize(("kind", "place"), [(cached, "cached"), (box, "forward")])
def test_what_cannot_be_rebound_is_refused(kind, place):
    original = model()
    kind(original)
    with pytest.raises(UnsupportedError, match=f"^{place} uses the Sequential of the model itself"):
        linearize(original)


def test_a_trained_parameter_in_a_closure_is_refused():
    """It is the copy's, but what stands in the closure cannot be made dual."""
    original = model()
    parameter(original)
    with pytest.raises(UnsupportedError, match=r"0\.weight .*gets lost"):
        linearize(original, example=X)
    linearize(original, "^2", example=X)


class Scripted(nn.Module):
    def forward(self, x):
        return x * 2


def lazy():
    return nn.Sequential(nn.LazyLinear(3))


def scripted():
    return nn.Sequential(nn.Linear(4, 3), torch.jit.script(Scripted()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("make", "words"), [(lazy, "0 .*lazy"), (scripted, "1 .*TorchScript")])
def test_lazy_and_scripted_models_are_refused_by_name(make, words):
    with pytest.raises(UnsupportedError, match=words):
        linearize(make())


def weight_norm(m):
    torch.nn.utils.weight_norm(m[0])


def pruned(m):
    prune.random_unstructured(m[0], "weight", 0.5)


def spectral_norm(m):
    torch.nn.utils.spectral_norm(m[0])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [pruned, spectral_norm])
def test_weights_that_hooks_compute(kind):
    """Of old; their non-leaf weights cannot be deep-copied, and are computed anew at every call."""
    original = model()
    kind(original)
    tangent = moved(linearize(original, example=X))
    exact = exact_jvp(tangent.anchor, tangent.deltas(), X)
    for _ in range(2):
        assert_near(tangent.primal_and_tangent(X), exact)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_weight_norm_is_refused_by_name():
    original = model()
    weight_norm(original)
    with pytest.raises(UnsupportedError, match="_weight_norm_interface has no forward-mode"):
        linearize(original, example=X)
