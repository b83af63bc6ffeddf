"""What one iteration of a kernel's main loop costs a multiprocessor of sm_90, counted in its SASS.

Every cost is in clocks, for one block, if its unit worked without a pause; the largest one limits
the kernel once enough blocks hide latency. Assumed rates, of one multiprocessor and clock:

- issue: one instruction of one warp in each of the four sub-partitions;
- tensor: 2,048 multiply-adds of 16-bit numbers by wgmma, half by mma.sync, half of each for tf32;
- MUFU: 16 exponentials, reciprocals and the like;
- ALU: 64 integer, comparison, selection and conversion results;
- shared memory: 128 bytes of wgmma's operands, LDS, STS, LDSM, STSM and LDGSTS, without conflicts.

Not counted: waits, among them those of serialized wgmma, L2 and global memory, and what TMA moves.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tools.kernels.resources import Resources
from tools.kernels.samples import Case
from tools.kernels.sass import Instruction

SUB_PARTITIONS = 4
LANES = 32
TENSOR_RATE = {"HGMMA": 2048, "HMMA": 1024}  # multiply-adds of 16-bit numbers per clock
MUFU_RATE = 16
ALU_RATE = 64
SHARED_RATE = 128  # bytes per clock

# Opcodes without suffixes by kind; every other opcode is "other".
KINDS = {
    "tensor": "HGMMA HMMA",
    "fp32": "FADD FFMA FMUL FMNMX FSEL FSETP FSET FCHK",
    "MUFU": "MUFU",
    "convert": "F2F F2FP F2I I2F I2FP FRND HADD2 HMUL2 HFMA2",
    "integer": "IABS IADD IADD3 IMAD IMNMX VIADD VIMNMX VIADDMNMX ISETP LEA LOP3 PLOP3 SHF SEL PRMT"
    " SGXT MOV CS2R S2R R2P P2R R2UR LDC S2UR UIADD3 UIMAD UISETP ULEA ULOP3 UPLOP3 USHF USEL"
    " UPRMT USGXT UMOV ULDC R2UR POPC FLO BMSK UBMSK",
    "global": "LDGSTS LDG STG LD ST UBLKCP UTMALDG UTMASTG ATOMG RED",
    "shared": "LDS STS LDSM STSM ATOMS",
    "SHFL": "SHFL",
    "wait": "BAR DEPBAR LDGDEPBAR WARPGROUP WARPSYNC MEMBAR FENCE SYNCS ERRBAR CCTL NANOSLEEP",
}
# Products of ROWS x COLS x D that the formulas of kernels/README.md take for a tile, by direction
# without " masked".
PRODUCTS = {
    "forward": 6, "forward x1": 6, "forward x2": 10, "forward x4": 18,
    "first query": 3, "first key value": 4, "first mask": 2,
    "second query": 9, "second key value": 12, "second mask": 6,
    "primal query": 8, "primal key value": 10, "primal mask": 6,
}  # fmt: skip
KIND = {name: kind for kind, names in KINDS.items() for name in names.split()}
# Of the ALU's rate; IMAD and FADD, FFMA, FMUL run elsewhere, and U... on a unit of their own.
ALU = {
    "F2FP", "FMNMX", "FSEL", "FSET", "FSETP", "IABS", "IADD", "IADD3", "IMNMX", "ISETP", "LEA",
    "LOP3", "MOV", "PLOP3", "PRMT", "SEL", "SGXT", "SHF", "VIADD", "VIADDMNMX", "VIMNMX",
}  # fmt: skip


@dataclass(frozen=True)
class Loop:
    """Costs of one iteration of a kernel's main loop, for one block."""

    scores: int  # (query, key) pairs
    # Multiply-adds done by those that the formulas need. Above 1: D is padded, warps repeat each
    # other's tiles, or float32 is multiplied by three tf32 products.
    work: float
    instructions: int  # of one warp
    kinds: dict[str, int]  # of KINDS, and "other" -> instructions
    rescaling: int  # of the instructions, those that change wgmma's running sums outside wgmma
    issue: float  # clocks, likewise below
    tensor: float
    mufu: float
    alu: float
    shared: float
    loaded: int  # bytes from global memory; what TMA loads is not in the SASS, and missing

    @property
    def per_1000(self) -> float:
        """Issue slots for 1,000 scores."""
        return 1000 * self.issue / self.scores


def costs_of(case: Case, found: Resources) -> Loop | None:
    """Costs of the main loop of the case's compiled kernel; None if it is not for sm_90.

    None also if no loop has matrix instructions.
    """
    if case.arch != 90 or not found.loop:
        return None
    scores = found.config.rows * found.config.cols
    needed = PRODUCTS[case.direction.removesuffix(" masked")] * scores * case.dim
    return loop_costs(found.loop, found.warps, scores, needed)


def loop_costs(way: Sequence[Instruction], warps: int, scores: int, needed: float) -> Loop:
    """Costs of one iteration.

    Args:
        way: its instructions, as :func:`tools.kernels.sass.main_loop` returns them; at least one.
        warps: warps of a block.
        scores: (query, key) pairs of a tile.
        needed: multiply-adds that the formulas need for one tile.
    """
    kinds = collections.Counter(KIND.get(one.name, "other") for one in way)
    done = sum(_multiply_adds(one, warps) for one in way)
    work = done / needed
    return Loop(
        scores=scores,
        work=work,
        instructions=len(way),
        kinds={kind: kinds[kind] for kind in (*KINDS, "other")},
        rescaling=_rescaling(way),
        issue=len(way) * warps / SUB_PARTITIONS,
        tensor=sum(_multiply_adds(one, warps) / _tensor_rate(one) for one in way if one.multiplies),
        mufu=kinds["MUFU"] * warps * LANES / MUFU_RATE,
        alu=sum(one.name in ALU for one in way) * warps * LANES / ALU_RATE,
        shared=sum(_shared_bytes(one, warps) for one in way) / SHARED_RATE,
        loaded=sum(_width(one) * warps * LANES for one in way if one.name in ("LDGSTS", "LDG")),
    )


def _shape(one: Instruction) -> tuple[int, int, int]:
    """M, N, K of a matrix instruction of sm_80 or sm_90."""
    if found := re.search(r"\.(\d+)x(\d+)x(\d+)\.", one.opcode):
        m, n, k = map(int, found.groups())
        return m, n, k
    found = re.search(r"\.16(8)(\d+)\.", one.opcode)
    assert found, one
    return 16, 8, int(found[2])


def _multiply_adds(one: Instruction, warps: int) -> int:
    """Multiply-adds of an instruction in all warps of a block; 4 warps share one wgmma."""
    if not one.multiplies:
        return 0
    m, n, k = _shape(one)
    return m * n * k * (warps // 4 if one.name == "HGMMA" else warps)


def _tensor_rate(one: Instruction) -> float:
    return TENSOR_RATE[one.name] / (2 if "TF32" in one.opcode else 1)


def _shared_bytes(one: Instruction, warps: int) -> int:
    """Bytes of shared memory that an instruction reads or writes in all warps of a block."""
    if one.predicate == "!PT":  # never: ptxas's barrier around a fence
        return 0
    if one.name == "HGMMA":
        m, n, k = _shape(one)
        size = 4 if "TF32" in one.opcode else 2
        # One descriptor stands for both operands; after a register there is only the second's.
        both = re.match(r"R\d+, gdesc", one.operands) is not None
        return (n + m * both) * k * size * (warps // 4)
    if one.name in ("LDSM", "STSM"):
        found = re.search(r"\.MT?88\.(\d)", one.opcode)
        return 128 * (int(found[1]) if found else 1) * warps
    if one.name in ("LDS", "STS", "LDGSTS"):
        return _width(one) * LANES * warps
    return 0


def _width(one: Instruction) -> int:
    """Bytes that a load or store moves for each lane."""
    found = re.search(r"\.(?:[US](8|16)|(64|128))(?=\.|$)", one.opcode)
    return int(found[1] or found[2]) // 8 if found else 4


def _rescaling(way: Sequence[Instruction]) -> int:
    """FP32 instructions on registers in which wgmma sums from iteration to iteration."""
    sums: set[int] = set()
    fresh: set[int] = set()
    for one in way:
        if one.name == "HGMMA":
            first = _registers(one)[0]
            own = range(first, first + _shape(one)[1] // 2)
            (fresh if "RZ, !UPT" in one.operands else sums).update(own)
    kept = sums - fresh
    return sum(KIND.get(one.name) == "fp32" and bool(kept & set(_registers(one))) for one in way)


def _registers(one: Instruction) -> list[int]:
    return [int(number) for number in re.findall(r"\bR(\d+)", one.operands)]
