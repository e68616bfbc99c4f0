"""Compile the CPU's kernels before they are needed: numba compiles one when it is first called.

What is compiled is kept (compile.py says where): some 15 seconds once on a machine, under a second from then on. On a
GPU kernels depend on the sizes, so nothing is done there.
"""

import functools

import torch

from olmoscope.kernels.dispatch import kernels_for
from olmoscope.kernels.interface import AdamStep, Moments
from olmoscope.progress import step_line

ROWS, D_MODEL, LATENTS, K = 8, 16, 128, 4


@functools.cache
def prepare_kernels(device: torch.device) -> None:
    """Call each kernel of a training step once on very small tensors, float32 as in training."""
    if device.type != "cpu":
        return
    with step_line("preparing kernels (compiled once on a machine, then kept)"):
        kernels = kernels_for(device)
        x_BD, W_FD, b_D = torch.ones(ROWS, D_MODEL), torch.ones(LATENTS, D_MODEL) / D_MODEL**0.5, torch.zeros(D_MODEL)
        values_BK, indices_BK = kernels.encode_topk(x_BD, W_FD, torch.zeros(LATENTS), K)
        found = kernels.residual(x_BD, values_BK, indices_BK, W_FD, b_D, None, None)
        pairs = kernels.sort_pairs(values_BK, found.dz_BK, indices_BK, LATENTS)
        moments = Moments(torch.zeros_like(W_FD), torch.zeros_like(W_FD))
        kernels.update_tied(W_FD, moments, pairs, found.e_BD, x_BD, AdamStep(0.0, 0.9, 0.999, 1e-8, 1))
