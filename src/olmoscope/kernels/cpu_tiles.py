"""LLVM instructions that the tiles of both 8-bit products on a CPU need.

A tile is a few rows times a few vectors of latents, with the sums in registers. It takes addresses, not arrays, for
which numba would check bounds and strides at each access.
"""

from llvmlite import ir

INT, LONG, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()


class Tile:
    """Writes the instructions of a tile whose vectors have `lanes` 32-bit lanes."""

    def __init__(self, builder, lanes):
        self.builder, self.lanes = builder, lanes
        self.ints, self.floats = ir.VectorType(INT, lanes), ir.VectorType(FLOAT, lanes)

    def at(self, base, *offsets):
        """An address and offsets in bytes, summed."""
        for offset in offsets:
            base = self.builder.add(base, ir.Constant(LONG, offset) if isinstance(offset, int) else offset)
        return base

    def load(self, address, kind, align):
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def times(self, value, factor):
        return self.builder.mul(value, ir.Constant(LONG, factor))

    def spread(self, scalar, vector_type):
        """A scalar in all lanes."""
        empty = ir.Constant(vector_type, ir.Undefined)
        first = self.builder.insert_element(empty, scalar, ir.Constant(INT, 0))
        return self.builder.shuffle_vector(first, empty, ir.Constant(self.ints, [0] * self.lanes))

    def store_scores(self, sums, scales, bias, input_scales, out, out_stride):
        """Store sums · scale of the latent · scale of the row + bias at `out`.

        Args:
            sums: integer vectors by (row, vector); the others are addresses, `out_stride` is in bytes.
        """
        for (row, vector), total in sums.items():
            scale = self.spread(self.load(self.at(input_scales, 4 * row), FLOAT, 4), self.floats)
            offset = 4 * self.lanes * vector
            value = self.builder.fmul(self.builder.sitofp(total, self.floats),
                                      self.load(self.at(scales, offset), self.floats, 4))
            value = self.builder.fadd(self.builder.fmul(value, scale), self.load(self.at(bias, offset), self.floats, 4))
            address = self.at(out, self.times(out_stride, row), offset)
            self.builder.store(value, self.builder.inttoptr(address, self.floats.as_pointer()), align=4)
