"""The anchor is a copy that shares nothing with the model, and stays in eval mode."""

from __future__ import annotations

import copy
import functools
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from small_models import assert_exact, assert_near, exact_jvp, generator, images, moved, vit
from torch import Tensor, nn
from torch.nn.utils import prune

from tangent_ops import linearize
from tangent_ops.errors import UnsupportedError

X = torch.randn(3, 4, generator=generator(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))


def wrapped(forward):
    @functools.wraps(forward)
    def call(*args):
        return forward(*args)

    return call


def recursive(m):
    def call(x, depth=1):
        return m[2](m[0](x)) if depth == 0 else call(x, depth - 1)

    return call


def of_a_global(m):
    names = {"m": m}
    exec("def forward(x):\n    return m[2](m[0](x))", names)
    return names["forward"]


# A name -> the forward function that is set on the instance m.
FORWARDS = {
    "compiled": lambda m: torch.compile(m.forward, backend="eager"),
    "wrapped": lambda m: wrapped(m.forward),
    "closure": lambda m: lambda x: m[2](m[1](m[0](x))),
    "decorated": lambda m: torch.enable_grad()(m.forward),
    "autocast": lambda m: torch.autocast("cpu", enabled=False)(m.forward),
    "default": lambda m: lambda x, own=m: own[2](own[0](x)),
    "keyword default": lambda m: lambda x, *, own=m: own[2](own[0](x)),
    "partial": lambda m: functools.partial(lambda own, x: own[2](own[0](x)), m),
    "method": lambda m: types.MethodType(lambda self, x: self[2](self[0](x)), m),
    "recursive": recursive,
    "of a global": of_a_global,
}


def hook_with_a_module(m):
    m[0].register_forward_hook(lambda module, inputs, output: output + m[2].weight.mean())


def pre_hook_with_a_parameter(m):
    bias = m[0].bias
    m[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + bias,))


def weak(m):
    m.parent = weakref.ref(m[2])
    m.forward = lambda x: m.parent()(m[0](x))


def in_a_list(m):
    m.calls = [lambda x: m[0](x), (lambda x: m[2](x),)]
    m.forward = lambda x: m.calls[1][0](m.calls[0](x))


OTHERS = {
    kind.__name__: kind for kind in (hook_with_a_module, pre_hook_with_a_parameter, weak, in_a_list)
}


class Plain(nn.Sequential):
    """The same function of the same parameters, as a forward method of a class."""

    def __init__(self, call) -> None:
        super().__init__(*model().children())
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


# What a kind computes; others leave the GELU out.
COMPUTES = {
    "hook_with_a_module": lambda m, x: m[2](m[1](m[0](x) + m[2].weight.mean())),
    "pre_hook_with_a_parameter": lambda m, x: m[2](m[1](m[0](x)) + m[0].bias),
    **dict.fromkeys(list(FORWARDS)[:5], lambda m, x: m[2](m[1](m[0](x)))),
}


@pytest.mark.parametrize("kind", [*FORWARDS, *OTHERS])
def test_functions_on_instances_belong_to_the_copy(kind):
    original = model()
    plain = Plain(COMPUTES.get(kind, lambda m, x: m[2](m[0](x))))
    if kind in FORWARDS:
        original.forward = FORWARDS[kind](original)
    else:
        OTHERS[kind](original)
    with torch.no_grad():
        tangent = moved(linearize(original, "weight", example=X))
        for weight in original.parameters():  # later changes do not reach the copy
            weight.fill_(7.0)
    assert_exact(tangent, plain, X)


def cached(m):
    m.cached = functools.lru_cache(m.forward)


def box(m):
    inside = [m]
    m.forward = lambda x: inside[0][2](inside[0][0](x))


@pytest.mark.parametrize(("kind", "place"), [(cached, "cached"), (box, "forward")])
def test_what_cannot_be_rebound_is_refused(kind, place):
    original = model()
    kind(original)
    with pytest.raises(UnsupportedError, match=f"^{place} uses the Sequential of the orig"):
        linearize(original)


def test_a_trained_parameter_in_a_closure_is_refused():
    """The closure holds the copy's parameter, which cannot be made dual there."""
    original = model()
    weight = original.get_parameter("0.weight")
    original.forward = lambda x: original[2](F.linear(x, weight))  # pyright: ignore
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


def pruned(m):
    prune.random_unstructured(m[0], "weight", 0.5)


def spectral_norm(m):
    torch.nn.utils.spectral_norm(m[0])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [pruned, spectral_norm])
def test_weights_that_hooks_compute(kind):
    """deepcopy refuses their non-leaf weights, which hooks compute at every call."""
    original = model()
    kind(original)
    tangent = moved(linearize(original, example=X))
    exact = exact_jvp(tangent.anchor, tangent.deltas(), X)
    for _ in range(2):
        assert_near(tangent.primal_and_tangent(X), exact)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_weight_norm_is_refused_by_name():
    original = model()
    torch.nn.utils.weight_norm(original[0])  # pyright: ignore
    with pytest.raises(UnsupportedError, match="_weight_norm_interface has no forward-mode"):
        linearize(original, example=X)


def test_the_model_is_left_alone_and_later_changes_do_not_reach_the_anchor():
    model, x = vit(drop_rate=0.5).train(), images()
    before = copy.deepcopy(model.state_dict())
    tangent = moved(linearize(model))
    exact = sum(exact_jvp(model, tangent.deltas(), x))
    tangent(x).sum().backward()
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_near(tangent(x), exact)


def test_the_anchor_stays_in_eval_mode():
    options = {"drop_rate": 0.5, "attn_drop_rate": 0.5, "proj_drop_rate": 0.5}
    model, x = vit(**options, drop_path_rate=0.5), images()
    tangent = moved(linearize(model.train()))
    exact = sum(exact_jvp(model, tangent.deltas(), x))
    nn.Sequential(tangent).train()
    assert tangent.training
    assert not any(module.training for module in tangent.anchor.modules())
    assert_near(tangent(x), exact)


def test_batch_norm_uses_its_running_statistics_and_keeps_them():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 2))
    model(3 * images(4) + 1)  # statistics other than 0 and 1
    tangent = moved(linearize(model)).train()
    before = copy.deepcopy(tangent.anchor.state_dict())
    x = images(3)
    assert_near(tangent(x), sum(exact_jvp(model, tangent.deltas(), x)))
    after = tangent.anchor.state_dict()
    assert all(torch.equal(value, after[n]) for n, value in before.items())
