"""Random numbers by name: every draw has a generator of its own, so no draw depends on how many came before."""

import zlib

import numpy as np


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A generator that is the same on every machine for the same seed, purpose and numbers.

    Args:
        purpose: what is drawn, e.g. `rows of a segment`; different purposes are independent.
        numbers: which one, e.g. the segment.
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *numbers])
