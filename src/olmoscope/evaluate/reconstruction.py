"""How well an SAE reconstructs rows: every figure of docs/metrics.md that needs no language model.

One pass, all sums in float64 and kept for each document and subset of the rows, so no figure depends on the batch
size. Shapes: R rows of a batch, D d_model, F latents, K places of a code, S subsets, P bins of positions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.store.outliers import mean_cosine
from olmoscope.errors import UserError
from olmoscope.evaluate.bootstrap import intervals
from olmoscope.evaluate.results import L0, Dead, Density, NormBin, OutlierRows, PositionBin
from olmoscope.evaluate.subsets import SUBSETS, LayerSurvey, RowFacts, Sums
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.codes import SparseCodes
from olmoscope.seeds import generator

DENSITY_BINS = [0.0, *(10.0 ** np.arange(-7, 0.01, 0.5)).tolist()]
"""Edges of the density histogram: a bin for "never", then half decades from 1e-7 to 1."""
POSITION_BINS = 32
"""Bins of positions: 0, 1, 2 to 3, 4 to 7, and so on."""
ROUNDING = 1e-12
"""A variance is a difference of sums of squares; below this share of the first of them it is 0 up to rounding."""
_QUANTITIES = ("rows", "zero_rows", "x2", "error2", "nmse", "cosine", "l2_ratio", "xhat2", "dot", "l1", "l0",
               "centred2")


class Reconstruction:
    """Sums over rows from which every figure follows: `add` batches, then ask for figures.

    A row of zeros has no direction, and no error in units of its norm. The means of NMSE, cosine and length ratio leave
    such rows out; they are counted separately.
    """

    def __init__(self, sae: SparseCoder, survey: LayerSurvey, groups: int, name: str = "the SAE") -> None:
        """
        Args:
            survey: of the rows to be written, which have the width of the reconstructions.
            groups: number of groups of documents.
        """
        self.sae, self.name = sae, name
        self.survey = survey
        self.sums = Sums(_QUANTITIES, groups)
        self.centred_sum_SD = torch.zeros(len(SUBSETS), len(survey.mean_D), dtype=torch.float64)
        self.l0_counts = torch.zeros(sae.d_sae + 1, dtype=torch.int64)
        self.fired_F = torch.zeros(sae.d_sae, dtype=torch.int64)
        self.by_position = torch.zeros(POSITION_BINS, 4, dtype=torch.float64)
        self.by_norm = torch.zeros(10, 5, dtype=torch.float64)
        self.outliers_3 = torch.zeros(3, dtype=torch.float64)
        """For rows of outlier norm: their number, how many are at a first position, and Σ‖x‖."""
        self.outlier_units_D = torch.zeros(len(survey.mean_D), dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """All sums, to be saved and restored in place."""
        return {"sums": self.sums.table_SGQ, "centred_sum": self.centred_sum_SD, "l0_counts": self.l0_counts,
                "fired": self.fired_F, "by_position": self.by_position, "by_norm": self.by_norm,
                "outliers": self.outliers_3, "outlier_units": self.outlier_units_D}

    @torch.no_grad()
    def add(self, x_RD: Tensor, facts: RowFacts) -> Tensor:
        """Count a batch of rows `[R, D]`, any float dtype; returns their reconstruction.

        Raises:
            UserError: the reconstruction is not finite.
        """
        xhat_RD, codes = self.sae.reconstruct(x_RD)
        self.add_reconstruction(x_RD, xhat_RD, codes, facts)
        return xhat_RD

    def add_reconstruction(self, x_RD: Tensor, xhat_RD: Tensor, codes: SparseCodes, facts: RowFacts) -> None:
        """Count rows that are already reconstructed; raises like `add`."""
        x_RD, xhat_RD = x_RD.double(), xhat_RD.double()
        centred_RD = x_RD - self.survey.mean_D.to(x_RD.device)
        x2_R, xhat2_R = x_RD.square().sum(1), xhat_RD.square().sum(1)
        dot_R, error2_R = (x_RD * xhat_RD).sum(1), (x_RD - xhat_RD).square().sum(1)
        l0_R = codes.l0()
        tiny = torch.finfo(torch.float64).tiny  # a reconstruction of exactly 0 has cosine 0
        zero_R = x2_R == 0

        def in_norms(square_R: Tensor) -> Tensor:
            return torch.where(zero_R, 0, square_R / torch.where(zero_R, 1, x2_R))

        values = {"rows": torch.ones_like(x2_R), "zero_rows": zero_R, "x2": x2_R, "error2": error2_R,
                  "nmse": in_norms(error2_R), "cosine": dot_R / (x2_R * xhat2_R).sqrt().clamp_min(tiny),
                  "l2_ratio": in_norms(xhat2_R).sqrt(), "xhat2": xhat2_R, "dot": dot_R,
                  "l1": codes.values.double().sum(1), "l0": l0_R, "centred2": centred_RD.square().sum(1)}
        values = {name: value.double().cpu() for name, value in values.items()}
        if bad := int((~values["error2"].isfinite()).sum()):
            raise UserError(f"{self.name}: {bad} of {len(x_RD)} rows or their reconstructions are NaN or infinite: the "
                            "SAE is broken, or it was trained on activations of another scale; check that --site and "
                            "--model are its own, and download it again")
        norm_R = values["x2"].sqrt()
        masks_SR = facts.masks(norm_R, self.survey)
        self.sums.add(values, facts.group_R, masks_SR)
        self.centred_sum_SD += (masks_SR.to(x_RD) @ centred_RD).cpu()
        self.l0_counts += torch.bincount(l0_R.cpu(), minlength=len(self.l0_counts))
        self.fired_F += torch.bincount(codes.indices[codes.values > 0].cpu(), minlength=len(self.fired_F))
        bin_R = torch.frexp(facts.position_R.double())[1].long()  # 0, 1, 2 to 3, 4 to 7, …
        self.by_position.index_add_(0, bin_R, torch.stack(
            [values["rows"], norm_R, values["nmse"], values["zero_rows"]], dim=1))
        self.by_norm.index_add_(0, torch.bucketize(norm_R, self.survey.norm_edges), torch.stack(
            [values[name] for name in ("rows", "nmse", "error2", "centred2", "zero_rows")], dim=1))

        self._add_outliers(x_RD.cpu(), norm_R, facts.position_R)

    def _add_outliers(self, x_RD: Tensor, norm_R: Tensor, position_R: Tensor) -> None:
        over_R = norm_R > self.survey.outlier_norm
        norm_N = norm_R[over_R]
        self.outliers_3 += torch.stack([over_R.sum(), (position_R[over_R] == 0).sum(), norm_N.sum()])
        self.outlier_units_D += (x_RD[over_R] / norm_N[:, None]).sum(0)

    def subset(self, name: str) -> dict[str, Any] | None:
        """The figures of a subset of the rows, by the names of `results.Subset`; None if it has no rows."""
        total = self.sums.total(name)
        if not total["rows"]:
            return None
        place = SUBSETS.index(name)
        # Sums are about the mean of all rows; about the subset's own mean, each row's square is smaller by this on
        # average.
        shift2 = float((self.centred_sum_SD[place] / total["rows"]).square().sum())

        def figures(sums: dict[str, Any]) -> dict[str, Any]:
            rows, with_norm = sums["rows"], sums["rows"] - sums["zero_rows"]
            variance = sums["centred2"] - rows * shift2
            fvu = sums["error2"] / np.where(variance > ROUNDING * sums["centred2"], variance, np.nan)
            return ({"fvu": fvu} | {key: sums[key] / rows for key in ("l0", "l1")}
                    | {key: sums[key] / with_norm for key in ("nmse", "cosine", "l2_ratio")})

        with np.errstate(invalid="ignore"):  # no row with a norm: 0 / 0
            found = figures({key: np.float64(value) for key, value in total.items()})
        known = {key: float(value) if np.isfinite(value) else None for key, value in found.items()}
        return {"rows": round(total["rows"]), "zero_rows": round(total["zero_rows"]), **known,
                "explained_variance": None if known["fvu"] is None else 1 - known["fvu"],
                "relative_reconstruction_bias": total["xhat2"] / total["dot"] if total["dot"] else None,
                "intervals": intervals(self.sums.table_SGQ[place], self.sums.quantities, figures)}

    def distributions(self) -> dict[str, Any]:
        """The figures that exist only for all rows, by the names of `results.Evaluation`."""
        rows = int(self.l0_counts.sum())
        density_F = self.fired_F.double() / rows
        occurring = torch.nonzero(self.l0_counts)[:, 0]
        cumulative = torch.cumsum(self.l0_counts, 0)
        percentiles = {f"p{p}": int(torch.searchsorted(cumulative, min(rows - 1, rows * p // 100), right=True))
                       for p in (5, 25, 50, 75, 95)}
        return {
            "l0": L0(mean=float(self.fired_F.sum()) / rows, **percentiles, values=occurring.tolist(),
                     rows=self.l0_counts[occurring].tolist()),
            "dead": Dead(share=float((self.fired_F == 0).double().mean()), window=rows),
            "density": Density(
                bin_edges=DENSITY_BINS,
                latents=np.histogram(density_F.numpy(), bins=[*DENSITY_BINS[:-1], np.nextafter(1, 2)])[0].tolist(),
                over_1_percent=float((density_F > 0.01).double().mean()),
                over_10_percent=float((density_F > 0.1).double().mean())),
            "by_position": [
                PositionBin(first=2**place // 2, last=2**place - 1, rows=round(count), norm=norm / count,
                            nmse=nmse / (count - zeros) if count > zeros else None)
                for place, (count, norm, nmse, zeros) in enumerate(self.by_position.tolist()) if count],
            "by_norm": self._norm_bins(),
            "outlier_rows": self._outlier_rows(),
        }

    def _outlier_rows(self) -> OutlierRows | None:
        count, first, norm = self.outliers_3.tolist()
        if not count:
            return None
        return OutlierRows(first=round(first), norm=norm / count, alike=mean_cosine(self.outlier_units_D, round(count)))

    def _norm_bins(self) -> list[NormBin]:
        survey = self.survey
        edges = [survey.smallest_norm, *survey.norm_edges.tolist(), survey.largest_norm]
        error2, centred2 = self.by_norm[:, 2].sum(), self.by_norm[:, 3].sum()
        return [NormBin(low=edges[place], high=edges[place + 1], rows=round(float(count)),
                        nmse=float(nmse / (count - zeros)) if count > zeros else None,
                        share_of_error=float(error / error2) if error2 else 0.0,
                        share_of_variance=float(variance / centred2) if centred2 else 0.0)
                for place, (count, nmse, error, variance, zeros) in enumerate(self.by_norm) if count]


@dataclass(frozen=True)
class RandomDirections:
    """A projection on k random unit directions: the baseline that any SAE must beat by far."""

    d_model: int
    k: int
    seed: int

    def nmse(self, x_BD: Tensor, mean_D: Tensor) -> float | None:
        """Mean over rows of ‖x − x̂‖² / ‖x‖², where x̂ is the mean plus the projection of x − mean on k random
        directions; None if all rows are zeros."""
        x_BD = x_BD[x_BD.any(dim=1)]
        if not len(x_BD):
            return None
        directions = generator(self.seed, "random directions").standard_normal((self.d_model, self.k))
        basis_DK = torch.from_numpy(np.linalg.qr(directions)[0])
        centred_BD = x_BD.double() - mean_D.double()
        error_BD = centred_BD - centred_BD @ basis_DK @ basis_DK.T
        return float((error_BD.square().sum(1) / x_BD.double().square().sum(1)).mean())
