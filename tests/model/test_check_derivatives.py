"""The check of J against the ordinary model's gradients, and the warning of a zero head."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import (
    VIT,
    Computes,
    Mlp,
    assert_exact,
    assert_near,
    exact_jvp,
    exact_vjp,
    family,
    generator,
    images,
    moved,
    vit,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from tangent_ops import linearize
from tangent_ops.errors import NoGradientWarning, UnsupportedError, ZeroHeadWarning

X = torch.randn(3, 4, generator=generator(1))


def layers(call) -> nn.Module:
    """Three layers, a, b and c; their forward is ``call(module, x)``."""
    torch.manual_seed(0)
    return Computes(call, a=nn.Linear(4, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3))


# --- what gets lost ----------------------------------------------------------------------------


def _function(factor_t: float, factor: float, zero: bool = False):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def jvp(ctx, x_t):
            return x_t * factor_t

        @staticmethod
        def backward(ctx, grad):
            return None if zero else grad * factor

    return Scaled.apply


WRONG = {
    "tangent dropped": lambda m, x: m.c(m.b(_function(0.0, 1.0)(m.a(x)))),
    "tangent off by a hundredth": lambda m, x: m.c(m.b(_function(1.01, 1.0)(m.a(x)))),
    "gradient dropped": lambda m, x: m.c(m.b(_function(1.0, 0.0)(m.a(x)))),
    "no gradient": lambda m, x: m.c(m.b(_function(1.0, 0.0, zero=True)(m.a(x)))),
}


# In 16 bits an error of a hundredth is within rounding.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in WRONG for dtype in (torch.float32, torch.float64)]
    + [(name, torch.bfloat16) for name in WRONG if "hundredth" not in name],
)
def test_a_lost_derivative_is_found_by_name(name, dtype):
    model, x = layers(WRONG[name]).to(dtype), X.to(dtype)
    with pytest.raises(UnsupportedError, match=r"a\.weight.*\(in Linear\) gets lost"):
        linearize(model, example=x)
    tangent = linearize(model)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=r"a\.weight"):
            tangent(x)
    linearize(model, example=x, check=False)(x)
    linearize(model, "^[bc]", example=x)(x)  # they are right


def test_one_small_parameter_of_a_transformer_is_found():
    model: Any = vit()
    with torch.no_grad():
        model.blocks[1].ls2.gamma.mul_(1e-4)  # whatever its size
    scale = model.blocks[1].ls2
    lost = _function(0.0, 1.0)
    scale.forward = lambda x: x * lost(scale.gamma)
    with pytest.raises(UnsupportedError, match=r"blocks\.1\.ls2\.gamma \(in LayerScale\)"):
        linearize(model, example=images())


# --- what passes -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("vit_tiny_patch16_224", {"depth": 2}, 224),
        ("eva02_tiny_patch14_224", {"depth": 2}, 224),  # gradients by keys' biases are rounding
        ("levit_128s", {}, 224),  # PyTorch's own gradient is wrong for one sample of it
    ],
)
def test_right_models_pass_in_every_dtype(name, options, size, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoGradientWarning)
        tangent = linearize(family(name, **options).to(dtype))
    assert not tangent._unchecked  # it was checked now


def test_rounding_alone_is_no_loss():
    """The gradient by a bias of keys is zero in exact arithmetic; here it is rounding."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))

    x = torch.randn(2, 2, 6, 8, generator=generator(3))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert not linearize(Attention().to(dtype), example=x.to(dtype))._unchecked
    with torch.autocast("cpu", torch.bfloat16):
        linearize(Attention(), example=x)(x)


def test_it_waits_for_inputs_that_work():
    model = vit()
    model.pretrained_cfg = {"input_size": (3, 224, 224)}  # not its own
    tangent = linearize(model)
    assert tangent._unchecked
    tangent(images())
    assert not tangent._unchecked


def test_it_waits_for_a_sample_that_gives_numbers():
    tangent = linearize(
        layers(lambda m, x: m.c(m.a(x).sum(-1, True).sqrt() * x.new_ones(1, 6))), "^a"
    )
    tangent(torch.full((2, 4), torch.nan))
    assert tangent._unchecked


def test_it_leaves_no_trace():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    state, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    tangent = linearize(model, example=X)
    assert torch.equal(numbers, torch.get_rng_state())
    assert not any(p.requires_grad for p in tangent.anchor.parameters())
    for name, value in tangent.anchor.state_dict().items():
        assert torch.equal(value, state[name])
    assert all(d.grad is None and not d.any() for d in tangent.deltas().values())


def test_inside_a_checkpoint_of_the_caller():
    tangent = linearize(layers(lambda m, x: m.c(torch.tanh(m.a(x)))), "^[ac]")
    output = checkpoint(tangent, X, use_reentrant=False)  # the first call is checked
    cotangent = torch.randn(3, 3, generator=generator(2))
    grads = torch.autograd.grad(output, list(tangent.deltas().values()), cotangent)
    assert_near(
        dict(zip(tangent.deltas(), grads, strict=True)),
        exact_vjp(tangent.anchor, list(tangent.deltas()), cotangent, X),
    )


# --- no gradient in the ordinary model either ----------------------------------------------------


def _no_grad_stem(m, x):
    with torch.no_grad():
        hidden = m.a(x)
    return m.c(torch.tanh(m.b(hidden)))


@torch.no_grad()
def _decorated(m, x):
    return m.a(x)


def _in_part(m, x):
    """The first layer is used with gradients and without."""
    with torch.no_grad():
        frozen = m.a(x)
        with torch.enable_grad():
            live = m.a(x)
        frozen = frozen * 2
    return m.c(torch.tanh(m.b(frozen * live)))


def _switched(m, x):
    torch.set_grad_enabled(False)
    hidden = m.a(x)
    torch.set_grad_enabled(True)
    return m.c(torch.tanh(m.b(hidden)))


def _inference(m, x):
    with torch.inference_mode():
        hidden = m.a(x)
    return m.c(torch.tanh(m.b(hidden.clone())))


WITHOUT = {
    "no_grad": _no_grad_stem,
    "a decorated function": lambda m, x: m.c(torch.tanh(m.b(_decorated(m, x)))),
    "set_grad_enabled": _switched,
    "inference_mode": _inference,
    "detach": lambda m, x: m.c(torch.tanh(m.b(m.a(x).detach()))),
    "unused": lambda m, x: m.c(torch.tanh(m.b(x @ x.new_ones(4, 6)))),
}


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", WITHOUT)
def test_what_gets_no_gradient_has_no_tangent(name, outside):
    """Ordinary fine-tuning does not change it either; one warning names it."""
    model = layers(WITHOUT[name])
    with pytest.warns(NoGradientWarning, match=r"either, on one sample: a\.weight, a\.bias\."):
        tangent = moved(linearize(model, example=X))
    with outside():
        primal, tangent_of_it = tangent.primal_and_tangent(X)
    deltas = {n: d for n, d in tangent.deltas().items() if not n.startswith("a.")}
    exact = exact_jvp(layers(WITHOUT["detach"] if name != "unused" else WITHOUT[name]), deltas, X)
    assert_near((primal, tangent_of_it), exact)
    output = tangent(X)
    grads = torch.autograd.grad(output.sum(), list(tangent.deltas().values()), allow_unused=True)
    for (delta, _), grad in zip(tangent.deltas().items(), grads, strict=True):
        assert (grad is None) == delta.startswith("a.")


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
def test_a_layer_that_is_used_both_ways(outside):
    model = layers(_in_part)
    tangent = moved(linearize(model, example=X))
    constant = model.a(X).detach() * 2
    same = layers(lambda m, x: m.c(torch.tanh(m.b(constant.to(x) * m.a(x)))))
    with outside():
        assert_near(tangent.primal_and_tangent(X), exact_jvp(same, tangent.deltas(), X))
    assert_exact(tangent, same, X)


# --- checkpoints inside the model ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("trained", ["^b", None])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_the_model_is_refused(reentrant, trained):
    call = lambda m, x: m.c(checkpoint(m.b, m.a(x), use_reentrant=reentrant))  # noqa: E731
    tangent = linearize(layers(call), trained, check=False)
    with pytest.raises(UnsupportedError, match=r"set_grad_checkpointing\(\)"):
        tangent(X)
    with pytest.raises(UnsupportedError, match=r"set_grad_checkpointing\(\)"):
        linearize(layers(call), trained)(X)
    blocks = linearize(nn.Sequential(nn.Sequential(layers(call))), "b", check=False)
    blocks.set_grad_checkpointing()
    with pytest.raises(UnsupportedError, match=r"set_grad_checkpointing\(\)"):
        blocks(X)


def test_a_model_that_uses_forward_mode_itself():
    def call(m, x):
        return m.c(torch.func.jvp(m.b, (m.a(x),), (torch.ones(len(x), 6),))[1])

    with pytest.raises(UnsupportedError, match="do not nest"):
        linearize(layers(call))(X)


# --- a zero head -----------------------------------------------------------------------------


def test_a_zero_head_is_said_once():
    model: Any = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    nn.init.zeros_(model.head.weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        linearize(model)
    ours = [w.category.__name__ for w in caught if w.category.__module__.startswith("tangent_ops")]
    assert ours == ["ZeroHeadWarning"]


def zeroed(model, *heads):
    with torch.no_grad():
        for head in heads:
            getattr(model, head).weight.zero_()
    return model


def test_zero_head_warns_at_the_caller():
    with pytest.warns(ZeroHeadWarning, match=r"only the head can learn.*fit_head") as caught:
        linearize(zeroed(vit(), "head"))
    assert caught[0].filename == __file__
    distilled = zeroed(family("deit_tiny_distilled_patch16_224", **VIT), "head", "head_dist")
    with pytest.warns(ZeroHeadWarning):
        linearize(distilled)


def test_no_warning_where_the_head_is_trained_alone_or_not_zero():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linearize(zeroed(vit(), "head"), r"^head\.")
        linearize(vit())
        linearize(zeroed(family("deit_tiny_distilled_patch16_224", **VIT), "head"))
        linearize(vit(num_classes=0))
        linearize(Mlp())
