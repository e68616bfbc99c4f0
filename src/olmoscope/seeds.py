"""Named random generators: every draw has its own, so no draw depends on how many came before."""

import zlib

import numpy as np


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A generator that is the same on every machine for the same seed, purpose and numbers.

    Args:
        purpose: what is drawn, e.g. `rows of a segment`; different purposes are independent.
        numbers: which draw of this purpose it is, e.g. the segment's number.
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *numbers])
