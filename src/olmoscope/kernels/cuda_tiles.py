"""How a GPU program holds the dictionary's rows of one batch row in registers: K latents by a few columns at a time."""

import triton

MOST_IN_TILE = 1024
"""Up to so many latents, 16 columns of theirs fit into registers; over it, plain torch computes."""
ELEMENTS = 4096
ELEMENTS_OF_A_WARP = 2048
"""Tried on an H200 for 64 latents of 4096 columns: 64 columns by 2 warps take 1.12 ms where 128 by 8 take 1.75. Few
warps spare the sums across them; many small programs hide that each waits for its rows."""


def row_tile(latents: int, d_model: int) -> tuple[int, int]:
    """Columns of a tile, a power of 2, and the warps of its program.

    Args:
        latents: rows of a tile, a power of 2.
    """
    columns = min(triton.next_power_of_2(d_model), max(16, ELEMENTS // latents))
    return columns, min(16, max(1, latents * columns // ELEMENTS_OF_A_WARP))
