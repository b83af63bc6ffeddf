"""Kernels for sm_90 that `compile_kernels.py` admits though they use its wgmma badly or not at all.

All are 16-bit kernels for heads of up to 128, by direction and head dimension of `configs.DIMS`.
"""

# ptxas makes each wgmma wait for the one before: see resources.serialization.
KNOWN_SERIALIZED: set[tuple[str, int]] = {
}

# Tiles of fewer than the 64 rows that wgmma takes: they use mma.sync.
KNOWN_WITHOUT_WGMMA: set[tuple[str, int]] = {
}
