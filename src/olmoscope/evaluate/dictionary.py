"""How alike an SAE's decoder directions are: for each latent, its largest cosine with another's.

Near copies (a split feature, or a latent that follows another) have cosines near 1. Shapes: F latents, C of a chunk.
"""

from collections.abc import Callable

import numpy as np
import torch

from olmoscope.evaluate.results import Dictionary
from olmoscope.progress import nobody
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.directions import unit_directions
from olmoscope.seeds import generator

ALL_UP_TO = 2**15
"""Up to this width all latents are compared; in a wider dictionary, a sample of SAMPLE latents is compared with all."""
SAMPLE = 2**14
BIN_EDGES = np.linspace(-1, 1, 81).round(3)
_ELEMENTS_AT_ONCE = 2**25


@torch.no_grad()
def decoder_cosines(sae: SparseCoder, latents_C: torch.Tensor,
                    advance: Callable[[int], None] = nobody) -> tuple[torch.Tensor, torch.Tensor]:
    """How similar some latents' decoder directions are to all others.

    A direction of length 0 has cosine 0 with all.

    Args:
        advance: called with the number of latents of each finished chunk.

    Returns:
        For each latent its largest cosine with another, and the mean absolute value of all its cosines with others;
        float32 on the CPU.
    """
    unit_FD = unit_directions(sae.W_dec)
    largest, absolute = [], []
    for chunk in torch.split(latents_C.to(unit_FD.device), max(1, _ELEMENTS_AT_ONCE // sae.d_sae)):
        cosines_CF = unit_FD[chunk] @ unit_FD.T
        itself = torch.arange(len(chunk), device=unit_FD.device), chunk
        cosines_CF[itself] = 0
        absolute.append(cosines_CF.abs().sum(dim=1).cpu() / max(1, sae.d_sae - 1))
        cosines_CF[itself] = -torch.inf
        largest.append(cosines_CF.max(dim=1).values.cpu())
        advance(len(chunk))
    return torch.cat(largest).clamp(-1, 1), torch.cat(absolute)


def latents_measured(d_sae: int) -> int:
    """How many latents of a dictionary `measure_dictionary` compares with all."""
    return d_sae if d_sae <= ALL_UP_TO else SAMPLE


def measure_dictionary(sae: SparseCoder, advance: Callable[[int], None] = nobody) -> Dictionary:
    """The distribution of the largest cosines, and the mean absolute value of all cosines."""
    count = latents_measured(sae.d_sae)
    latents = np.arange(sae.d_sae)
    if count < sae.d_sae:
        draws = generator(0, "latents whose cosines are measured")
        latents = np.sort(draws.choice(sae.d_sae, count, replace=False))
    cosines, absolute = (found.double().numpy() for found in decoder_cosines(sae, torch.from_numpy(latents), advance))
    return Dictionary(
        latents=len(latents), mean_absolute=float(absolute.mean()), mean=float(cosines.mean()),
        p50=float(np.percentile(cosines, 50)), p95=float(np.percentile(cosines, 95)), largest=float(cosines.max()),
        over_90_percent=float((cosines > 0.9).mean()), bin_edges=BIN_EDGES.tolist(),
        counts=np.histogram(cosines, bins=BIN_EDGES)[0].tolist())
