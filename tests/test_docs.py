"""The code on the Markdown pages runs as shown: a page's set-up and blocks, as one program."""

from __future__ import annotations

import copy
import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import assert_near, vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Subset

import tangent_ops
from tangent_ops.ops.backend import interpreting
from tools.pages.blocks import (
    ROOT,
    Block,
    PageError,
    blocks,
    check,
    pages,
    python_blocks,
    run,
)

HAS_CUDA = torch.cuda.is_available() and not interpreting()
LONG = [page for page in pages() if "<!-- needs time:" in page.read_text(encoding="utf-8")]
# Of extras: where they are not installed, the pages that import them are skipped.
OPTIONAL = {"einops", "huggingface_hub", "matplotlib", "sklearn", "transformers"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True)
def as_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder, with an environment of its own; weights are small and random."""
    create = timm.create_model

    def create_model(name: str, *args: Any, pretrained: bool = False, **options: Any) -> Any:
        if not pretrained:
            return create(name, *args, **options)
        return vit(depth=1, num_classes=options.get("num_classes", 10))

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)


def run_page(page: Path, *able: str) -> dict[str, Any]:
    """Run a page's code with what this machine has."""
    try:
        return run(page, {*able, *(["cuda"] if HAS_CUDA else [])})
    except ImportError as error:
        missing = getattr(error, "name", None) in OPTIONAL or "tangent-ops[" in str(error)
        if not missing:
            raise
        pytest.skip(str(error))


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")  # the rival's
@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_page(page: Path) -> None:
    names = run_page(page)
    RESULTS.get(name_of(page), finite)(names)


@pytest.mark.long
@pytest.mark.parametrize("page", LONG, ids=name_of)
def test_page_with_blocks_that_take_time(page: Path) -> None:
    run_page(page, "time")


def finite(names: dict[str, Any]) -> None:
    """Of any page: what it trained is a number."""
    tangent = names.get("tangent")
    if isinstance(tangent, tangent_ops.LinearizedModel):
        assert all(value.isfinite().all() for value in tangent.deltas().values())


def as_never_added(names: dict[str, Any]) -> None:
    """The ledger of the README is that of the samples that were not forgotten."""
    rest = Subset(names["private_set"], [0, 1, 2, 3, 8, 10, 11])
    never = tangent_ops.statistics(names["tangent"], rest)
    assert names["ledger"].statistics() == never
    expected = never.choose().delta
    assert all(torch.equal(d, expected[n]) for n, d in names["tangent"].deltas().items())
    assert names["y_t"].any()


def no_step_was_skipped(names: dict[str, Any]) -> None:
    assert all(delta.any() for delta in names["tangent"].deltas().values())
    assert names["scaler"].get_scale() == 1024


def same_tangent_as_math(names: dict[str, Any]) -> None:
    """Of the last attention on the page, as the MATH backend's of the first."""
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.func.jvp(names["model"], names["primals"], names["tangents"])
    torch.testing.assert_close(names["y_t"], expected, rtol=1e-4, atol=1e-4)


def as_pytorch_in_float64(names: dict[str, Any]) -> None:
    """The recipes are short, and compute what PyTorch does in float64 by MATH."""
    recipes = python_blocks(ROOT / "docs/jvp-recipes.md")[1:]
    assert all(1 <= len(recipe.code.strip().splitlines()) <= 11 for recipe in recipes)
    exact = copy.deepcopy(names["model"]).double()
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    z, v, r, t, s, x, x_t, scale, dt, data, noise = (
        names[name].detach().double()
        for name in ("z", "v", "r", "t", "s", "x", "x_t", "scale", "dt", "data", "noise")
    )
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tangents = (v, torch.zeros_like(r), torch.ones_like(t))
        _, u_t = torch.func.jvp(exact, (z, r, t), tangents)
        times = (x, torch.zeros_like(t), s.flatten())
        _, f_t = torch.func.jvp(exact, times, (scale * x_t, torch.zeros_like(t), dt))
    assert_near(names["u_t"], u_t)
    assert_near(names["f_t"], f_t)
    step = 1e-5
    with torch.no_grad():  # along the path of sCM, by differences
        after, before = (
            exact(s.add(d).cos() * data + s.add(d).sin() * noise, 0 * t, s.add(d).flatten())
            for d in (step, -step)
        )
    assert_near(names["f_t"], scale * (after - before) / (2 * step), 1e-4)
    with sdpa_kernel(SDPBackend.MATH):
        product = torch.autograd.functional.vhp(
            lambda x: exact(x, r, t).square().sum(), data, noise
        )[1]
    assert_near(names["product"], product)
    classifier = names["classifier"]
    weights = {name: p.detach() for name, p in classifier.named_parameters()}
    rows = torch.func.jacrev(lambda w: torch.func.functional_call(classifier, w, (names["data"],)))(
        weights
    )
    flat = torch.cat([row.flatten(2).flatten(0, 1) for row in rows.values()], dim=1)
    assert_near(names["kernel"], (flat @ flat.T).double())
    assert names["covariance"].shape == (2, 3, 3) and (names["deviation"] > 0).all()


RESULTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "README.md": as_never_added,
    "docs/precision.md": no_step_was_skipped,
    "docs/coming-from.md": same_tangent_as_math,
    "docs/jvp-recipes.md": as_pytorch_in_float64,
}


def test_the_example_of_the_readme_has_ten_lines() -> None:
    first = python_blocks(ROOT / "README.md")[0]
    assert 10 <= len([line for line in first.code.splitlines() if line]) <= 13


@pytest.mark.gpu
def test_cuda_graphs() -> None:
    """A replay computes what an eager call does, with the deltas that there are then."""
    inference, training = python_blocks(ROOT / "docs/cuda-graphs.md")
    names: dict[str, Any] = {}
    exec(inference.code, names)
    deltas = names["tangent"].deltas()
    with torch.no_grad():
        for delta in deltas.values():
            delta.normal_(std=0.02)
    names["inference"].replay()
    torch.testing.assert_close(names["outputs"], names["infer"](), rtol=1e-4, atol=1e-5)

    exec(training.code, names)
    state = copy.deepcopy(names["optimizer"].state_dict())
    before = {name: delta.detach().clone() for name, delta in deltas.items()}
    names["training"].replay()
    replayed = {name: delta.detach().clone() for name, delta in deltas.items()}
    with torch.no_grad():
        for name, delta in deltas.items():
            delta.copy_(before[name])
    names["optimizer"].load_state_dict(state)
    names["step"]()
    for name, delta in deltas.items():
        moved = float((replayed[name] - before[name]).norm())
        assert float((replayed[name] - delta.detach()).norm()) <= 1e-3 * moved + 1e-7, name
    assert any(float((replayed[name] - before[name]).norm()) > 1e-4 for name in before)


def written(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(textwrap.dedent(text), encoding="utf-8")
    return page


def test_the_blocks_of_a_page(tmp_path: Path) -> None:
    page = written(
        tmp_path,
        """\
        Text:

            indented

        - item

          ```python
          a = 1

          ```

        <!-- needs cuda: a reason -->
        ```python
        b = 2
        ```
        ```text
            no block of its own
        ```
        """,
    )
    found = [(b.line, b.language, b.code, b.needs) for b in blocks(page)]
    assert found == [
        (3, None, "indented\n", None),
        (8, "python", "a = 1\n\n", None),
        (14, "python", "b = 2\n", "cuda"),
        (17, "text", "    no block of its own\n", None),
    ]


def test_a_block_is_run_with_the_names_of_those_before(tmp_path: Path) -> None:
    (tmp_path / "names.py").write_text("a = 1\n")
    page = written(
        tmp_path,
        """\
        Its [set-up](names.py).
        ```python
        b = a + 1
        ```
        <!-- needs network: a reason -->
        ```python
        b = 5
        ```
        ```python
        c = b + 1
        ```
        """,
    )
    assert run(page, able=set())["c"] == 3
    assert run(page, able={"network"})["c"] == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nx = undefined\n```\n", "name 'undefined' is not defined"),
        ("Text.\n\n    import torch\n", "fence this code"),
        ("Its [set-up](none.py).\n", "none.py does not exist"),
        ("Its [set-up](a.py), its [set-up](b.py).\n", "2 links named set-up"),
        ("<!-- needs luck: why -->\n```python\n1\n```\n", "needs WHAT: the reason"),
        ("<!-- needs cuda -->\n```python\n1\n```\n", "needs WHAT: the reason"),
        ('```python title="x"\n1\n```\n', "after ```python"),
    ],
)
def test_a_page_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((PageError, NameError), match=message):
        run(written(tmp_path, text), able=set())


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("y = f(x)", "f is not defined"),
        ("import torch\ntorch.nn.Linaer(1, 2)", "torch.nn has no Linaer"),
        ("from tangent_ops import nothing", "nothing"),
        ("import tangent_ops.nothing", "nothing"),
        ("def (", "invalid syntax"),
    ],
)
def test_a_block_that_is_not_run_is_checked(code: str, error: str) -> None:
    with pytest.raises((PageError, ImportError, SyntaxError), match=error):
        check(Block(ROOT / "page.md", 1, "python", code, "cuda"), {"x": 1})


def test_a_right_block_that_is_not_run_passes() -> None:
    code = """
    import torch, tangent_ops
    from absent.package import thing

    def call(a, *rest, b=0):
        return [c for c in (a, b, *rest, x)]

    with torch.no_grad() as mode, open("f") as file:
        for row in thing(file, mode):
            last = call(row)
    print(tangent_ops.fit(last), lambda d: d)
    """
    block = Block(ROOT / "page.md", 1, "python", textwrap.dedent(code), "package absent")
    check(block, {"x": 1})
