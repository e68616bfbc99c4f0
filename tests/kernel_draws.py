"""Random rows and codes for tests of kernels, float64, on the device under test.

Shapes: B rows, K places.
"""

import torch
from hypothesis import settings
from torch import Tensor

from kernel_backends import DEVICE, FEW

EXAMPLES = settings(max_examples=8 if FEW else 40, deadline=None)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def codes(seed: int, rows: int, latents: int, k: int, shut: float = 0.2) -> tuple[Tensor, Tensor]:
    """Values (descending, some 0 at the end) and distinct indices, as `encode_topk` returns them."""
    generator = torch.Generator().manual_seed(seed)
    indices_BK = torch.stack([torch.randperm(latents, generator=generator)[:k] for _ in range(rows)])
    values_BK = torch.rand(rows, k, dtype=torch.float64, generator=generator) - shut
    return values_BK.relu().sort(dim=1, descending=True).values.to(DEVICE), indices_BK.to(DEVICE)
