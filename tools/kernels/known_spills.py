"""Spills, excess and waits that `compile_kernels.py` admits: no tiles were found without them."""

TRITON = "3.8"  # the version that the table below is for
OTHER_TRITON = 64  # bytes that another version may spill beyond the table; 3.6 spills 8 in places

# KNOWN_SPILLS[direction, bits, dim][arch]: the most bytes of registers spilled per thread, rounded
# up to a multiple of 64. No 16-bit kernel for heads of up to 128 is here.
KNOWN_SPILLS: dict[tuple[str, int, int], dict[int, int]] = {
    ("first mask", 16, 256): {100: 64},
    ("second key value", 16, 256): {80: 384, 86: 192, 90: 256, 100: 192},
    ("second mask", 16, 256): {80: 128, 86: 64, 90: 128, 100: 64},
    ("second query", 16, 256): {86: 64, 90: 256, 100: 64},
    ("first key value", 32, 64): {86: 64},
    ("forward masked", 32, 64): {100: 64},
    ("second key value", 32, 64): {80: 576, 86: 384, 90: 448, 100: 448},
    ("second mask", 32, 64): {80: 256, 86: 320, 90: 384, 100: 320},
    ("second query", 32, 64): {80: 640, 86: 576, 90: 576, 100: 576},
    ("first key value", 32, 128): {80: 64, 100: 64},
    ("first mask", 32, 128): {80: 128, 86: 128, 90: 128, 100: 128},
    ("first query", 32, 128): {86: 64},
    ("forward masked", 32, 128): {80: 704, 86: 640, 90: 576, 100: 704},
    ("forward x1", 32, 128): {80: 384, 86: 384, 90: 384, 100: 448},
    ("second key value", 32, 128): {80: 7744, 86: 3136, 90: 7488, 100: 6784},
    ("second mask", 32, 128): {80: 9280, 86: 8128, 90: 9216, 100: 10368},
    ("second query", 32, 128): {80: 7680, 86: 6400, 90: 7616, 100: 7744},
    ("first key value", 32, 256): {80: 320, 86: 256, 90: 256, 100: 320},
    ("first mask", 32, 256): {80: 5504, 86: 4736, 90: 5632, 100: 5440},
    ("first query", 32, 256): {80: 128, 86: 128, 90: 128, 100: 192},
    ("forward masked", 32, 256): {80: 7360, 86: 4352, 90: 7552, 100: 7552},
    ("forward x1", 32, 256): {80: 7360, 86: 4224, 90: 7232, 100: 7424},
    ("second key value", 32, 256): {80: 15744, 86: 13120, 90: 15616, 100: 14976},
    ("second mask", 32, 256): {80: 11840, 86: 9920, 90: 11968, 100: 11712},
    ("second query", 32, 256): {80: 15424, 86: 12544, 90: 16448, 100: 15296},
}

# KNOWN_EXCESS[direction, bits, dim]: architectures with too little shared memory for the smallest
# tiles there are. A call there ends in Triton's OutOfResources, before anything is computed.
KNOWN_EXCESS: dict[tuple[str, int, int], tuple[int, ...]] = {
    ("second query", 32, 256): (86,),
    ("second key value", 32, 256): (86,),
}

# Heads of sm_90 whose 16-bit kernel ptxas serializes all the same, by direction.
KNOWN_SERIALIZED = {"second key value": (8,)}
