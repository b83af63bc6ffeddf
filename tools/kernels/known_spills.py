"""Spills, excess and waits that `compile_kernels.py` admits: no tiles were found without them."""

TRITON = "3.8"  # the version that the table below is for
OTHER_TRITON = 64  # bytes that another version may spill beyond the table; 3.6 spills 8 in places

# KNOWN_SPILLS[direction, bits, dim][arch]: the most bytes of registers spilled per thread, rounded
# up to a multiple of 64. No 16-bit kernel for heads of up to 128 is here.
KNOWN_SPILLS: dict[tuple[str, int, int], dict[int, int]] = {
    ("first mask", 16, 256): {100: 64},
    ("second key value", 16, 256): {80: 128, 86: 64, 90: 64, 100: 128},
    ("second mask", 16, 256): {80: 64, 86: 64, 90: 64, 100: 64},
    ("first key value", 32, 64): {100: 64},
    ("forward masked", 32, 64): {100: 64},
    ("second key value", 32, 64): {80: 64, 86: 64, 90: 64, 100: 64},
    ("second mask", 32, 64): {80: 320, 86: 320, 90: 384, 100: 320},
    ("second query", 32, 64): {80: 128, 86: 128, 90: 128, 100: 192},
    ("first mask", 32, 128): {80: 64, 86: 64, 90: 64, 100: 128},
    ("forward masked", 32, 128): {80: 704, 86: 640, 90: 576, 100: 704},
    ("forward x1", 32, 128): {80: 384, 86: 384, 90: 384, 100: 448},
    ("second key value", 32, 128): {80: 6528, 86: 1152, 90: 6336, 100: 6592},
    ("second mask", 32, 128): {80: 9472, 86: 2880, 90: 9216, 100: 8960},
    ("second query", 32, 128): {80: 3712, 86: 512, 90: 704, 100: 832},
    ("first key value", 32, 256): {80: 64, 86: 128, 90: 128, 100: 192},
    ("first mask", 32, 256): {80: 5888, 86: 4928, 90: 5632, 100: 5824},
    ("first query", 32, 256): {80: 64, 86: 64, 90: 64, 100: 192},
    ("forward masked", 32, 256): {80: 7360, 86: 4352, 90: 7552, 100: 7552},
    ("forward x1", 32, 256): {80: 7360, 86: 4224, 90: 7232, 100: 7424},
    ("second key value", 32, 256): {80: 13760, 86: 11520, 90: 13824, 100: 13568},
    ("second mask", 32, 256): {80: 12096, 86: 9984, 90: 11968, 100: 11392},
    ("second query", 32, 256): {80: 7552, 86: 6528, 90: 8448, 100: 9152},
}

# KNOWN_EXCESS[direction, bits, dim]: architectures with too little shared memory for the smallest
# tiles there are. A call there ends in Triton's OutOfResources, before anything is computed.
KNOWN_EXCESS: dict[tuple[str, int, int], tuple[int, ...]] = {
    ("second query", 32, 256): (86,),
    ("second key value", 32, 256): (86,),
}

# Heads of sm_90 whose 16-bit kernel ptxas serializes all the same, by direction.
KNOWN_SERIALIZED = {"second key value": (8,)}
