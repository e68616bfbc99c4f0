"""Stochastic rounding to bfloat16 with random bits that are a hash of (step, shard, element), without state to keep.

A number is rounded up with a probability equal to its fractional distance to the next one, so the mean is right. The
hash is the finaliser of MurmurHash3 (public domain) over the element's number, mixed with the step and the shard. The
kernels contain the same arithmetic; this is its definition in torch.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9
MIX1 = 0x85EBCA6B
MIX2 = 0xC2B2AE35
_MASK = 0xFFFFFFFF


def step_seed(count: int, shard: int = 0) -> int:
    """32 bits for a step and a shard of a dictionary; the shard counts because each shard numbers its elements from 0.
    """
    return (count * GOLDEN ^ shard * MIX1) & _MASK


def random_bits(elements: Tensor, seed: int) -> Tensor:
    """32 random bits for each element number (int64 in, int64 out, in [0, 2**32)): the low half is for the first
    moment, the high half for the second.

    Args:
        seed: from `step_seed`.
    """
    bits = (elements ^ seed) & _MASK
    bits = ((bits ^ (bits >> 16)) * MIX1) & _MASK
    bits = ((bits ^ (bits >> 13)) * MIX2) & _MASK
    return bits ^ (bits >> 16)


def round_to_bfloat16(value: Tensor, bits16: Tensor) -> Tensor:
    """Round stochastically.

    Args:
        value: any float dtype; converted to float32 first.
        bits16: int64 in [0, 2**16), one for each value.
    """
    pattern = value.float().view(torch.int32).to(torch.int64) & _MASK
    high = (pattern + bits16) >> 16
    return high.to(torch.int32).to(torch.int16).view(torch.bfloat16)
