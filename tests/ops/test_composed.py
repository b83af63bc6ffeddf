"""Operations composed of others: PyTorch's values bit for bit, tangents right to one rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tangent_ops import fused_forward_ad
from tests.ops import nestings
from tests.ops.oracle import pushforward

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Op = Callable[[Tensor], Tensor]
OPS: dict[str, Op] = {
    "hardsigmoid": F.hardsigmoid,
    "hardsigmoid in place": lambda x: F.hardsigmoid(x.clone(), inplace=True),
    "glu": F.glu,
    "glu, first dimension": lambda x: F.glu(x, 0),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "normalize, two dimensions": lambda x: F.normalize(x, dim=(0, 1)),
    "normalize, far from zero": lambda x: F.normalize(x, eps=3.0),
}


def fused(op: Op, x: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
    with fused_forward_ad():
        return pushforward(op, (x,), (x_t,))


def values(dtype: torch.dtype) -> Tensor:
    """(48, 40), from -4 to 4 in steps of 1/240, rounded."""
    return torch.linspace(-4, 4, 48 * 40, dtype=torch.float64).view(48, 40).to(dtype)


@pytest.mark.parametrize("tracked", [False, True], ids=["frozen", "tracked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_a_tangent_changes_no_value(name, dtype, tracked) -> None:
    x = values(dtype)
    x_t = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    y, y_t = fused(OPS[name], x.clone().requires_grad_(tracked), x_t)
    assert torch.equal(y, OPS[name](x))
    assert y_t.dtype == dtype
    _, exact = pushforward(OPS[name], (x.double(),), (x_t.double(),))
    # Half an ulp, at most eps/2 of the result, of the last rounding; float32 intermediates of
    # size at most 5 (tangents of 4 times slopes of 1 and less) come before it.
    allowed = 0.5 * torch.finfo(dtype).eps * exact.abs() + 16 * torch.finfo(torch.float32).eps
    assert bool(((y_t.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_hardsigmoid_up_to_its_kinks(dtype) -> None:
    """2.984375 + 3 is 6 in bfloat16, and the slope 1/6 all the same."""
    eps = torch.finfo(dtype).eps
    inside = torch.tensor([-3 + 2 * eps, -2.984375, 0.0, 2.984375, 3 - 2 * eps], dtype=dtype)
    outside = torch.tensor([-torch.inf, -4.0, -3.0, 3.0, 4.0, torch.inf, torch.nan], dtype=dtype)
    for x, slope in ((inside, 1 / 6), (outside, 0.0)):
        y, y_t = fused(F.hardsigmoid, x, torch.ones_like(x))
        assert torch.equal(y_t, torch.full_like(x, slope))
        torch.testing.assert_close(y, F.hardsigmoid(x), rtol=0, atol=0, equal_nan=True)
        own_t = pushforward(F.hardsigmoid, (x,), (torch.ones_like(x),))[1]
        assert torch.equal(y_t, own_t)


@pytest.mark.parametrize("name", OPS)
def test_not_a_number_stays_where_pytorch_has_it(name) -> None:
    x = values(torch.float32).clone()
    x[3, 5], x[7, 30], x[9, 2] = torch.nan, torch.inf, -torch.inf
    found = fused(OPS[name], x, torch.ones_like(x))
    own = pushforward(OPS[name], (x,), (torch.ones_like(x),))
    torch.testing.assert_close(found[0], own[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1].isnan(), own[1].isnan())


@pytest.mark.parametrize(
    "name, shape",
    [("glu", (3, 0)), ("glu, first dimension", (0, 4)), ("glu", (0, 4)), ("hardsigmoid", (0,)),
     ("normalize", (3, 0)), ("normalize", (0, 3))],
)  # fmt: skip
def test_nothing_at_all(name, shape) -> None:
    x = torch.ones(shape)
    y, y_t = fused(OPS[name], x, x)
    assert y.shape == y_t.shape == OPS[name](x).shape


@pytest.mark.parametrize("args", [(torch.ones(2, 3),), (torch.ones(2, 4), 5), (torch.ones(()),)])
def test_glu_refuses_what_it_refuses_without_a_tangent(args) -> None:
    with pytest.raises((RuntimeError, IndexError)) as own:
        F.glu(*args)
    with pytest.raises(type(own.value)) as ours, fused_forward_ad(), forward_ad.dual_level():
        F.glu(forward_ad.make_dual(args[0], args[0]), *args[1:])
    assert str(ours.value) == str(own.value)


# The same in elementary operations, which have derivatives of every order.
IN_WORDS: dict[str, Op] = {
    "hardsigmoid": lambda x: x.clamp(-3, 3) / 6 + 0.5,
    "glu": lambda x: x[..., :2] / (1 + (-x[..., 2:]).exp()),
    "normalize": lambda x: x / (x * x).sum(-1, keepdim=True).sqrt(),
}


@pytest.mark.parametrize("case", nestings.CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("name", IN_WORDS)
def test_nestings(name, case) -> None:
    source = torch.Generator().manual_seed(0)
    operands = [(torch.randn(3, 4, generator=source, dtype=torch.float64),) for _ in range(3)]
    with fused_forward_ad():
        found = case(OPS[name], *operands)
    exact = case(IN_WORDS[name], *operands)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)


def test_complex_rows_have_pytorchs_length() -> None:
    x = torch.complex(*torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double())
    found = fused(OPS["normalize"], x, 1j * x)
    torch.testing.assert_close(found, pushforward(OPS["normalize"], (x,), (1j * x,)))


def test_compiled() -> None:
    x, x_t = values(torch.float32), torch.ones(48, 40)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, x_t):
        with fused_forward_ad():
            return torch.func.jvp(lambda x: F.hardsigmoid(F.glu(x)), (x,), (x_t,))

    exact = torch.func.jvp(lambda x: F.hardsigmoid(F.glu(x)), (x.double(),), (x_t.double(),))
    for one, right in zip(compiled(x, x_t), exact, strict=True):
        # float32 products and sums of size 4, a handful of them
        assert float((one - right).abs().max()) <= 16 * torch.finfo(torch.float32).eps


def test_an_output_changed_in_place_under_nested_transforms() -> None:
    """Refused as in elementary operations, where it gave wrong third derivatives."""
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def words(x):
        return x / x.square().sum(1, keepdim=True).sqrt()

    def routed(x):
        with fused_forward_ad():
            return F.normalize(x, dim=1)

    for function in (words, routed):
        changed = torch.func.jacfwd(lambda x, f=function: f(x).add_(x))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.func.hessian(changed)(x)
