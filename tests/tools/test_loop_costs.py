"""The main loop is found in SASS, and its costs are those counted by hand."""

from __future__ import annotations

import pytest

from tools.kernels.loop_costs import loop_costs
from tools.kernels.sass import main_loop, parse

# A loop over heads with a loop over tiles in it, and a second one that checks indices. The inner
# loop seldom goes to 0x140, and comes back.
SASS = """
	code for sm_90a
		Function : some_kernel
        /*0000*/                   S2R R0, SR_CTAID.X ;         /* 0x0000000000007919 */
                                                                /* 0x000e620000002500 */
        /*0010*/                   MOV R1, RZ ;
        /*0020*/              @!P2 BRA 0xd0 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R6.64], P3 ;
        /*0040*/                   WARPGROUP.ARRIVE ;
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R8, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/               @P1 BRA 0x140 ;
        /*0080*/                   MUFU.EX2 R8, R8 ;
        /*0090*/                   FMUL R40, R40, R3 ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8].tnspB, R24, gsb0 ;
        /*00b0*/                   IADD3 R6, R6, 0x20, RZ ;
        /*00c0*/              @!P0 BRA 0x30 ;
        /*00d0*/                   ISETP.GE.AND P1, PT, R4, R5, PT ;
        /*00e0*/                   FSEL R8, R8, -INF , !P1 ;
        /*00f0*/                   HGMMA.64x32x16.F32.BF16 R8, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0100*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0110*/                   LDS.64 R20, [R7] ;
        /*0120*/               @P3 BRA 0xd0 ;
        /*0130*/                   BRA 0x170 ;
        /*0140*/                   FADD R9, R9, R10 ;
        /*0150*/                   FADD R9, R9, R11 ;
        /*0160*/                   BRA 0x80 ;
        /*0170*/               @P4 BRA 0x10 ;
        /*0180*/                   EXIT ;
        /*0190*/                   BRA 0x190;
"""


def test_the_main_loop_is_the_inner_one_without_index_checks() -> None:
    code = parse(SASS)
    assert len(code) == 26
    # The tail has as many matrix instructions in 6 instructions: make it the longer one.
    tail = SASS.replace("LDS.64 R20, [R7] ;", "LDS.64 R20, [R7] ;" + more(0x111, 6))
    assert [one.address for one in main_loop(parse(tail))] == list(range(0x30, 0xD0, 0x10))
    assert [one.address for one in main_loop(code)] == list(range(0xD0, 0x130, 0x10))
    assert main_loop([one for one in code if not one.multiplies]) == []


@pytest.mark.parametrize(
    ("inline", "way"),
    [
        (2, [0x0, 0x10, 0x20, 0x30, 0x60, 0x80]),
        (4, [0x0, 0x10, 0x70, 0xA0, 0xB0, 0xC0, 0x80]),
    ],
)
def test_a_called_function_belongs_to_the_iteration(inline, way) -> None:
    fast = "".join(f"/*{0x20 + 16 * n:04x}*/ FADD R1, R1, R2 ;" for n in range(inline))
    text = f"""
        /*0000*/ HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0010*/ @P0 BRA 0x70 ;
        {fast}
        /*0060*/ BRA 0x80 ;
        /*0070*/ CALL.REL.NOINC 0xa0 ;
        /*0080*/ @P1 BRA 0x0 ;
        /*0090*/ EXIT ;
        /*00a0*/ IMAD R1, R1, R2, RZ ;
        /*00b0*/ IMAD R1, R1, R2, RZ ;
        /*00c0*/ RET.REL.NODEC R2 0x0 ;
        /*00d0*/ EXIT ;
    """
    assert [one.address for one in main_loop(parse(text))] == way


def test_the_iteration_takes_the_way_with_all_products() -> None:
    text = """
        /*0000*/ HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0010*/ @P0 BRA 0x40 ;
        /*0020*/ HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/ FADD R1, R1, R2 ;
        /*0040*/ @P1 BRA 0x0 ;
    """
    assert [one.address for one in main_loop(parse(text))] == [0x0, 0x10, 0x20, 0x30, 0x40]


def test_rescaling_is_of_sums_that_outlive_the_iteration() -> None:
    way = parse("""
        /*0000*/ HGMMA.64x32x16.F32.BF16 R8, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0010*/ HGMMA.64x32x16.F32.BF16 R8, gdesc[UR8], R8, gsb0 ;
        /*0020*/ FMUL R8, R8, R3 ;
        /*0030*/ HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0040*/ FFMA R56, R55, R3, R4 ;
        /*0050*/ FFMA R57, R56, R3, R4 ;
    """)
    assert loop_costs(way, 4, scores=1, needed=1).rescaling == 1  # R24 to R55


def more(first: int, count: int) -> str:
    lines = (f"\n        /*{first + n:04x}*/    FADD R9, R9, R12 ;" for n in range(count))
    return "".join(lines)


def test_the_costs_of_a_loop() -> None:
    way = parse(SASS)[3:13]
    costs = loop_costs(way, warps=8, scores=128 * 32, needed=64 * 32 * 16 + 64 * 64 * 16)
    assert costs.work == 2  # two warpgroups, of which the formula needed one
    assert costs.instructions == 10
    assert costs.issue == 10 * 8 / 4
    assert costs.per_1000 == pytest.approx(20 / 4.096)
    assert costs.tensor == 2 * (16 + 32)
    assert costs.mufu == 8 * 32 / 16
    assert costs.alu == 8 * 32 / 64  # IADD3
    # Of the first wgmma both operands, 64 + 32 rows of 16 numbers; of the second one 64 rows.
    assert costs.shared == (2 * (96 + 64) * 16 * 2 + 8 * 32 * 16) / 128
    assert costs.loaded == 8 * 32 * 16
    assert costs.rescaling == 1  # R40 is one of the second wgmma's R24 to R55
    kinds = {kind: count for kind, count in costs.kinds.items() if count}
    assert kinds == {
        "tensor": 2, "wait": 2, "fp32": 1, "MUFU": 1, "integer": 1, "global": 1, "other": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "warps", "tensor", "shared"),
    [
        ("HMMA.16816.F32.BF16 R4, R8, R10, R4", 4, 8, 0),
        ("HMMA.1688.F32.TF32 R4, R8, R10, R4", 4, 8, 0),
        ("HGMMA.64x16x8.F32.TF32 R4, gdesc[UR4], R4, gsb0", 4, 8, (64 + 16) * 8 * 4),
        ("LDSM.16.MT88.4 R4, [R8]", 4, 0, 4 * 4 * 128),
        ("STS.U16 [R8], R4", 8, 0, 8 * 32 * 2),
        ("@!PT LDS RZ, [RZ]", 4, 0, 0),
        ("LDS.128 R4, [R8+0x80]", 1, 0, 32 * 16),
    ],
)
def test_instructions_by_themselves(line, warps, tensor, shared) -> None:
    way = parse(f"/*0000*/ {line} ;")
    costs = loop_costs(way, warps, scores=1, needed=1)
    assert (costs.tensor, costs.shared) == (tensor, shared / 128)
