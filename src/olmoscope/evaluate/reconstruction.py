"""How well an SAE reconstructs held-out rows: every figure of docs/metrics.md that needs no language model.

One pass, all sums in float64, so no figure depends on the batch size. Shapes: B rows, D d_model, F latents, K active.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.store import Store
from olmoscope.progress import bar
from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.topk import TopK
from olmoscope.seeds import generator

ROWS_AT_ONCE = 4096
DENSITY_BINS = [0.0, *(10.0 ** np.arange(-7, 0.01, 0.5)).tolist()]
"""Edges of the density histogram: never, then half decades from 1e-7 to 1."""


class Reconstruction:
    """Sums over rows from which every figure follows; `add` batches, then `figures`."""

    def __init__(self, sae: TopK) -> None:
        self.sae = sae
        self.rows = 0
        self.x_sum_D = torch.zeros(sae.d_model, dtype=torch.float64)
        self.sums = dict.fromkeys(("x2", "error2", "nmse", "cosine", "l2_ratio", "xhat2", "dot", "l1"), 0.0)
        self.l0_counts = torch.zeros(sae.k + 1, dtype=torch.int64)
        self.fired_F = torch.zeros(sae.d_sae, dtype=torch.int64)

    @torch.no_grad()
    def add(self, x_BD: Tensor) -> None:
        """Count a batch of rows `[B, D]`, any float dtype."""
        xhat_BD, codes = self.sae.reconstruct(x_BD)
        self.add_reconstruction(x_BD, xhat_BD, codes)

    def add_reconstruction(self, x_BD: Tensor, xhat_BD: Tensor, codes: SparseCodes) -> None:
        """Count rows that were reconstructed already."""
        x_BD, xhat_BD = x_BD.double(), xhat_BD.double()
        x2_B, xhat2_B = x_BD.square().sum(1), xhat_BD.square().sum(1)
        dot_B, error2_B = (x_BD * xhat_BD).sum(1), (x_BD - xhat_BD).square().sum(1)
        values_BK = codes.values_BK.double()
        self.rows += len(x_BD)
        self.x_sum_D += x_BD.sum(0).cpu()
        tiny = torch.finfo(torch.float64).tiny  # a reconstruction of exactly 0 has cosine 0
        for name, value_B in {"x2": x2_B, "error2": error2_B, "nmse": error2_B / x2_B, "xhat2": xhat2_B, "dot": dot_B,
                              "cosine": dot_B / (x2_B * xhat2_B).sqrt().clamp_min(tiny),
                              "l2_ratio": (xhat2_B / x2_B).sqrt(), "l1": values_BK.sum(1)}.items():
            self.sums[name] += float(value_B.sum())
        self.l0_counts += torch.bincount(codes.l0().cpu(), minlength=len(self.l0_counts))
        self.fired_F += torch.bincount(codes.indices_BK[codes.values_BK > 0].cpu(), minlength=len(self.fired_F))

    def figures(self) -> dict[str, Any]:
        """Every figure, as JSON values; definitions in docs/metrics.md."""
        rows, sums = self.rows, self.sums
        variance = sums["x2"] - float(self.x_sum_D.square().sum()) / rows
        fvu = sums["error2"] / variance
        density_F = self.fired_F.double() / rows
        l0_sorted = torch.repeat_interleave(torch.arange(len(self.l0_counts)), self.l0_counts)
        percentiles = {f"p{p}": int(l0_sorted[min(rows - 1, rows * p // 100)]) for p in (5, 25, 50, 75, 95)}
        return {
            "rows": rows,
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "nmse": sums["nmse"] / rows,
            "cosine": sums["cosine"] / rows,
            "l2_ratio": sums["l2_ratio"] / rows,
            "relative_reconstruction_bias": sums["xhat2"] / sums["dot"] if sums["dot"] else None,
            "l0": {"mean": float(self.fired_F.sum()) / rows, **percentiles},
            "l1": sums["l1"] / rows,
            "dead": {"share": float((self.fired_F == 0).double().mean()), "window": rows},
            "density": {
                "bin_edges": DENSITY_BINS,
                "latents": np.histogram(density_F.numpy(), bins=[*DENSITY_BINS[:-1], np.nextafter(1, 2)])[0].tolist(),
                "over_1_percent": float((density_F > 0.01).double().mean()),
                "over_10_percent": float((density_F > 0.1).double().mean())},
        }


@dataclass(frozen=True)
class RandomDirections:
    """What k random unit directions would give: the floor that any SAE must be far above."""

    d_model: int
    k: int
    seed: int

    def nmse(self, x_BD: Tensor, mean_D: Tensor) -> float:
        """Mean over rows of ‖x − x̂‖² / ‖x‖², x̂ = mean + the projection of x − mean on k random directions."""
        directions = generator(self.seed, "random directions").standard_normal((self.d_model, self.k))
        basis_DK = torch.from_numpy(np.linalg.qr(directions)[0])
        centred_BD = x_BD.double() - mean_D.double()
        error_BD = centred_BD - centred_BD @ basis_DK @ basis_DK.T
        return float((error_BD.square().sum(1) / x_BD.double().square().sum(1)).mean())


def evaluate(sae: TopK, store: Store, layer: int, name: str) -> dict[str, Any]:
    """Evaluate an SAE on all rows of a store at its layer.

    Args:
        name: shown beside the progress bar.

    Returns:
        `Reconstruction.figures`, and `nmse_random_directions` for comparison (on the first rows of each segment).
    """
    measured = Reconstruction(sae)
    device = sae.W_dec_FD.device
    with bar(name, store.rows, "rows") as advance:
        for segment, rows in enumerate(store.segment_rows):
            for start in range(0, rows, ROWS_AT_ONCE):
                x_BD = store.read(layer, segment, slice(start, min(rows, start + ROWS_AT_ONCE))).to(device)
                measured.add(x_BD)
                advance(len(x_BD))
    first_BD = torch.cat([store.read(layer, segment, slice(0, min(rows, ROWS_AT_ONCE // len(store.segment_rows) + 1)))
                          for segment, rows in enumerate(store.segment_rows)])
    random = RandomDirections(sae.d_model, min(sae.k, sae.d_model), seed=0)
    return measured.figures() | {
        "nmse_random_directions": random.nmse(first_BD, store.sample_mean(layer, "none"))}
