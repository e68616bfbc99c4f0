"""How a language model responds to reconstructions: cross-entropy and KL with x̂, zeros or the mean instead of x.

KL(clean ‖ other) is Σ_v p_v (log p_v − log q_v), both logarithms from log-softmax in float64: no probability is ever
rounded to 0 before its logarithm is taken. Shapes: R rows of a batch, C of a chunk, D d_model, V vocabulary, S subsets.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from olmoscope.evaluate.bootstrap import intervals
from olmoscope.evaluate.results import Language
from olmoscope.evaluate.subsets import SUBSETS, RowFacts, Sums
from olmoscope.model.splice import CausalLM

LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}
"""Most logits of one run held at a time: on a CPU, few enough for its caches; on a GPU, enough to keep it busy."""
_QUANTITIES = ("rows", "kl", "kl_zero", "kl_mean", "kl_outliers_kept", "predictions", "ce_clean", "ce_spliced",
               "ce_zero", "ce_mean", "ce_outliers_kept")


class Replaced(NamedTuple):
    """For each replacement of x, the index of the pass of the model that had it."""

    spliced: int
    """x̂."""
    kept: int
    """x̂, except that rows of outlier norm stay as they are; the same pass as `spliced` if there are no such rows."""
    zero: int
    mean: int


class Divergence:
    """Cross-entropy per row of several runs of the model on the same tokens, and their KL from the first run.

    Args:
        hidden: last hidden states `[R, D]` of the runs; the first is the clean one.
        next_R: the token that follows each row, −1 if there is none.
    """

    def __init__(self, model: CausalLM, hidden: list[Tensor], next_R: Tensor) -> None:
        rows = len(next_R)
        self.ce = [torch.zeros(rows, dtype=torch.float64) for _ in hidden]
        self.kl = [torch.zeros(rows, dtype=torch.float64) for _ in hidden]
        has_next_R = next_R >= 0
        size = max(1, LOGITS_AT_ONCE.get(model.device.type, 2**22) // model.vocabulary)
        for start in range(0, rows, size):
            part = slice(start, min(rows, start + size))
            next_C1 = next_R[part].clamp_min(0)[:, None].to(model.device)
            clean_CV = torch.log_softmax(model.logits(hidden[0][part]).double(), dim=1)
            p_CV = clean_CV.exp()
            self.ce[0][part] = -clean_CV.gather(1, next_C1)[:, 0].cpu()
            for number, hidden_RD in enumerate(hidden[1:], start=1):
                log_CV = torch.log_softmax(model.logits(hidden_RD[part]).double(), dim=1)
                self.ce[number][part] = -log_CV.gather(1, next_C1)[:, 0].cpu()
                self.kl[number][part] = (p_CV * (clean_CV - log_CV)).sum(1).cpu()
        for ce_R in self.ce:
            ce_R[~has_next_R] = 0.0
        self.predicted_R = has_next_R.double()


class LanguageSums:
    """Sums of one SAE: `add` batches, then call `subset`."""

    def __init__(self, groups: int) -> None:
        self.sums = Sums(_QUANTITIES, groups)

    def add(self, measured: Divergence, passes: Replaced, facts: RowFacts, masks_SR: Tensor) -> None:
        """Count a batch.

        Args:
            passes: which passes of `measured` had which replacement.
        """
        spliced, kept, zero, mean = passes
        self.sums.add({
            "rows": torch.ones_like(measured.predicted_R), "predictions": measured.predicted_R,
            "kl": measured.kl[spliced], "kl_zero": measured.kl[zero], "kl_mean": measured.kl[mean],
            "kl_outliers_kept": measured.kl[kept], "ce_outliers_kept": measured.ce[kept],
            "ce_clean": measured.ce[0], "ce_spliced": measured.ce[spliced], "ce_zero": measured.ce[zero],
            "ce_mean": measured.ce[mean]}, facts.group_R, masks_SR)

    def subset(self, name: str) -> Language | None:
        """The figures of a subset; None if nothing is predicted in it."""
        total = self.sums.total(name)
        if not total["predictions"]:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            found = _figures({key: np.float64(value) for key, value in total.items()})
        figures: dict[str, Any] = {key: float(value) if np.isfinite(value) else None for key, value in found.items()}
        return Language(
            rows=round(total["rows"]), predictions=round(total["predictions"]),
            intervals=intervals(self.sums.table_SGQ[SUBSETS.index(name)], self.sums.quantities, _figures), **figures)


def _figures(sums: dict[str, Any]) -> dict[str, Any]:
    """Figures from sums; docs/metrics.md has the definitions."""
    ce = {key: sums[key] / sums["predictions"] for key in _QUANTITIES if key.startswith("ce_")}
    kl = {key: sums[key] / sums["rows"] for key in _QUANTITIES if key.startswith("kl")}
    recovered = {f"loss_recovered_{key}": (ce[f"ce_{key}"] - ce["ce_spliced"]) / (ce[f"ce_{key}"] - ce["ce_clean"])
                 for key in ("zero", "mean")}
    return ce | kl | recovered | {"delta_ce": ce["ce_spliced"] - ce["ce_clean"],
                                  "delta_ce_outliers_kept": ce["ce_outliers_kept"] - ce["ce_clean"]}
