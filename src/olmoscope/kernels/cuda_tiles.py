"""How a GPU program holds a batch row's dictionary rows in registers: K latents by a few columns at a time."""

import triton

MOST_IN_TILE = 1024
"""The most latents of which 16 columns fit into registers; above this, plain torch computes."""
ELEMENTS = 4096
ELEMENTS_OF_A_WARP = 2048
"""Measured on an H200 for 64 latents of 4096 columns: 64 columns by 2 warps take 1.12 ms, 128 by 8 take 1.75. Few warps
need fewer sums across warps; many small programs hide the time that each waits for its rows."""


def row_tile(latents: int, d_model: int) -> tuple[int, int]:
    """Columns of a tile, a power of 2, and the warps of its program.

    Args:
        latents: rows of a tile, a power of 2.
    """
    columns = min(triton.next_power_of_2(d_model), max(16, ELEMENTS // latents))
    return columns, min(16, max(1, latents * columns // ELEMENTS_OF_A_WARP))
