"""Kernels are compiled without a GPU: registers, specialisation, offsets, and their autotuning."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
from tangent_kernels._launch import Config, Launch
from tangent_kernels.attention import Call, attention_jvp, attention_vjp, configs
from torch.torch_version import TorchVersion

from tangent_ops.ops.backend import interpreting
from tools.kernels import compile_kernels
from tools.kernels.compile_kernels import (
    admitted_spill,
    default_cases,
    measure,
    problems_of,
    row_cases,
    row_problems,
)
from tools.kernels.known_spills import KNOWN_SPILLS
from tools.kernels.loop_costs import costs_of
from tools.kernels.resources import Resources, compile_launch, serialization, specialize
from tools.kernels.samples import Case, launch_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreting(), reason="an interpreted kernel cannot be compiled"),
]

ALWAYS = [direction for direction in configs.DIRECTIONS if direction not in configs.OPTIONAL]

OPTIONAL = [one for one in configs.OPTIONAL if not one.startswith("primal")]

# One wgmma, whose sums are changed while it runs.
PTX = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 out, .param .u64 left, .param .u64 right)
{
    .reg .f32 %f<4>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd0, [out];
    ld.param.u64 %rd1, [left];
    ld.param.u64 %rd2, [right];
    mov.f32 %f0, 0f00000000;
    mov.f32 %f1, 0f00000000;
    mov.f32 %f2, 0f00000000;
    mov.f32 %f3, 0f00000000;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd1, %rd2, 1, 1, 1, 0, 0;
    add.f32 %f0, %f0, 0f3F800000;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.global.v4.f32 [%rd0], {%f0, %f1, %f2, %f3};
    ret;
}
"""  # noqa: E501


def marked(case: Case):
    """`make test` compiles each kernel for sm_90, one for each of the others; the rest is long."""
    usual = case.dtype == torch.bfloat16 and case.dim == 64 and case.variant == "plain"
    here = usual and (case.arch == 90 or case.direction == "first query")
    return pytest.param(case, marks=() if here else pytest.mark.long, id=case.name)


@pytest.mark.parametrize("case", [marked(case) for case in default_cases()])
def test_a_kernel_fits_with_its_default_tiles(case) -> None:
    found = measure(case)
    assert problems_of(case, found) == []
    if case.arch == 90 and case.dtype == torch.bfloat16 and case.dim == 64:
        costs = costs_of(case, found)
        assert costs is not None
        assert costs.work == 1, "the main loop does other products than those of the formulas"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case[:2] in ((80, 384), (90, 384)) else pytest.mark.long)
        for case in row_cases((80, 86, 90, 100))
    ],
)
def test_kernels_of_rows_do_not_spill(case) -> None:
    problems = row_problems(case)
    if TorchVersion(triton.__version__) < "3.8":  # 3.6 spills two registers in one kernel
        problems = [words for words in problems if not words.endswith(" spills 8 bytes")]
    assert problems == []


def test_the_command_reports_spills_and_excess(monkeypatch, capsys) -> None:
    case = Case("first query", 90, torch.bfloat16, 64)
    monkeypatch.setattr(compile_kernels, "default_cases", lambda archs: [case])
    monkeypatch.setattr(compile_kernels, "row_cases", lambda archs: [])
    monkeypatch.setattr(sys, "argv", ["compile_kernels", "--jobs", "1"])
    assert compile_kernels.main() == 0
    assert "1 kernels by Triton" in capsys.readouterr().out

    bad = Resources(255, 800, 300_000, 0, 4, 0, 0, 0)
    assert [problem.split(": ")[1] for problem in problems_of(case, bad)] == [
        f"spills 800 bytes, admitted are {admitted_spill(case)}",
        "300000 bytes of shared memory of 232448",
        "compiled to no matrix instruction",
    ]
    case = Case("first key value", 90, torch.bfloat16, 64)
    slow = Resources(100, 0, 0, 0, 4, 0, 8, 0, serialized="(C7515) wgmma is serialized")
    assert problems_of(case, slow) == [f"{case.name}: (C7515) wgmma is serialized"]
    without = Resources(100, 0, 0, 0, 4, 8, 0, 0)
    assert problems_of(case, without) == [f"{case.name}: compiled without wgmma"]
    for other in (replace(case, dtype=torch.float32), replace(case, dim=256, arch=80)):
        assert problems_of(other, without) == []


def test_ptxas_says_whether_wgmma_waits() -> None:
    launch = launch_of(Case("first key value", 90, torch.bfloat16, 64))
    compiled = compile_launch(launch, 90)
    assert serialization(compiled) == ""
    changed = SimpleNamespace(asm={"ptx": PTX}, metadata=compiled.metadata)
    assert serialization(changed).startswith("(C7517) warpgroup.wait is injected")
    good = "\n".join(line for line in PTX.splitlines() if "add.f32" not in line)
    assert serialization(SimpleNamespace(asm={"ptx": good}, metadata=compiled.metadata)) == ""


def test_16_bit_kernels_of_the_usual_heads_have_no_known_spills() -> None:
    assert not [key for key in KNOWN_SPILLS if key[1] == 16 and key[2] <= 128]


def test_the_table_has_tiles_for_every_call() -> None:
    needed = {
        configs.Key(direction, arch, bits, dim)
        for direction in ALWAYS
        for dim in configs.DIMS
        for arch, bits in [*((arch, 16) for arch in configs.ARCHS), (80, 32)]
    }
    apart = {
        key: key._replace(direction=key.direction.replace("second", "primal"))
        for key in needed
        if key.direction.startswith("second")
        and key._replace(direction="primal query") in configs.table()
    }
    needed = needed - apart.keys() | set(apart.values())
    assert apart
    assert {key for key in configs.table() if key.direction not in OPTIONAL} == needed
    made = json.loads(configs.TABLE.read_text(encoding="utf-8"))["made"]
    assert set(made) == {str(arch) for arch in configs.ARCHS}
    for header in made.values():
        assert set(header) == {"how", "machine", "date", "triton", "torch"}


@pytest.mark.parametrize("arch", [75, 86, 87, 89, 90, 100, 103, 120])
def test_another_architecture_takes_tiles_of_a_known_one(arch) -> None:
    assert configs.family(arch) in configs.ARCHS


@pytest.mark.parametrize("variant", ["plain", "boolean", "additive"])
@pytest.mark.parametrize("direction", ALWAYS)
def test_the_number_of_tokens_never_specialises_a_kernel(direction, variant) -> None:
    if direction.endswith("mask"):  # has no boolean one
        variant = variant.replace("boolean", "plain")
    kinds = set()
    for tokens in (1, 16, 50, 197, 256, 257):
        case = Case(direction, 90, torch.bfloat16, 64, variant, tokens=tokens)
        source, options = specialize(launch_of(case), 90)
        kinds.add(repr((source.signature, source.constants, source.attrs, options)))
    assert len(kinds) == 1


@pytest.mark.parametrize("direction", ALWAYS)
def test_offsets_beyond_2_to_the_31_are_64_bit(direction) -> None:
    """A batch stride below 2^31 times a batch index may be above: multiply in 64 bits.

    Tiles may count from their own origin in 32 bits: ROWS strides are far below 2^31.
    """
    case = Case(direction, 90, torch.bfloat16, 64, "additive")
    launch = launch_of(case)
    ir = compile_launch(launch, 90).asm["ttir"]
    arguments = set(re.findall(r"(%[\w.]+): i32", re.findall(r"tt\.func public.*", ir)[0]))
    # A number of tensors, heads or tiles may be multiplied in 32 bits: the grid counts in those.
    counts = {"%batch", "%heads", "%shared", "%mask_batch", "%mask_heads"}
    wide, narrow = 0, []
    for line in ir.splitlines():
        if found := re.search(r"arith\.muli (%[\w.]+), (%[\w.]+) : i32", line):
            narrow += arguments.intersection(found.groups()) - counts
        if found := re.search(r"tt\.addptr .* : !tt\.ptr<\w+>, (i\d+)", line):
            assert found[1] == "i64", line
            wide += 1
    assert narrow == []
    assert wide >= 8


@pytest.mark.parametrize("direction", ALWAYS)
def test_strides_beyond_2_to_the_31_compile(direction) -> None:
    launch = launch_of(Case(direction, 90, torch.bfloat16, 64))
    huge = 2**33
    arguments = launch.arguments | {
        name: (launch.arguments[name][0], huge, huge, huge, huge, 0) for name in "qkv"
    }
    ir = compile_launch(Launch(launch.kernel, launch.grid, arguments, launch.config), 90).asm
    pattern = r"%q[\w.]*: (i\d+)"
    assert "i64" in re.findall(pattern, re.findall(r"tt\.func public.*", ir["ttir"])[0])


def small_call() -> tuple[Call, torch.Tensor]:
    query, tangent = torch.randn(1, 2, 16, 64).half(), torch.randn(1, 1, 2, 16, 64).half()
    call = Call(query, query, query, None, None, 0.125, 0.0, False)
    return call, tangent


def test_autotuning_keeps_the_fastest(monkeypatch) -> None:
    call, _ = small_call()
    monkeypatch.setattr(configs, "_tuned", {})
    key = configs.key_of("first query", call)
    fastest = configs.candidates(key)[3]
    timed: list[Config] = []

    def seconds(call, run) -> float:
        config = configs.configure("first query", call)[0]
        timed.append(config)
        if len(timed) == 2:
            raise RuntimeError("out of shared memory")
        return 1.0 if config == fastest else 2.0

    monkeypatch.setattr(configs, "_seconds", seconds)
    monkeypatch.setattr(configs, "_can_time", lambda call: True)
    monkeypatch.setenv("TANGENT_OPS_AUTOTUNE", "1")
    configs.autotune(call, ["first query"], lambda: None)
    assert configs.configure("first query", call)[0] == fastest
    assert timed[0] == configs.table()[key]
    count = len(timed)
    configs.autotune(call, ["first query"], lambda: None)  # once for each key
    assert len(timed) == count


@pytest.mark.parametrize("wanted", ["0", "1"])
def test_autotuning_is_off_unless_it_is_switched_on(wanted, monkeypatch) -> None:
    call, tangent = small_call()
    timed: list[str] = []
    monkeypatch.setattr(configs, "_tuned", {})
    monkeypatch.setattr(configs, "_seconds", lambda call, run: timed.append("") or 1.0)
    monkeypatch.setattr(configs, "_can_time", lambda call: True)
    monkeypatch.setattr(Launch, "run", lambda launch: None)
    monkeypatch.setenv("TANGENT_OPS_AUTOTUNE", wanted)
    output, _, lse, _ = attention_jvp(call, tangent)
    attention_vjp(call, output, lse, tangent, (True, True, False, False))
    tuned = {key.direction for key in configs._tuned}
    expected = {"forward x1", "first query", "first key value"}
    assert tuned == (expected if wanted == "1" else set())
    assert bool(timed) == (wanted == "1")
