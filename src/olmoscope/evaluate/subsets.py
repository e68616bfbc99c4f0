"""Facts about rows: the subsets that they are in and their documents; and sums for each subset and document.

Shapes: N tokens of the text, R rows of a batch, S subsets, G groups of documents, Q quantities, D d_model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.store.statistics import OUTLIER  # a row is an outlier if its norm is over this many medians
from olmoscope.errors import UserError
from olmoscope.evaluate.chat_parts import NAMES as PARTS
from olmoscope.evaluate.sequences import Sequences

SUBSETS = ("all", "without_special", "without_first", "without_outliers", "ordinary", "prompt", "thinking", "answer")
FIRST_POSITIONS = 1
"""Positions of a sequence that `without_first` leaves out."""
MOST_GROUPS = 8192
"""Up to this number, each document has its own sums; beyond it, every MOST_GROUPS-th document shares sums."""


@dataclass(frozen=True)
class LayerSurvey:
    """Statistics of all rows of a site, which must be known before the rows are measured."""

    mean_D: Tensor
    """float64."""
    median_norm: float
    norm_edges: Tensor
    """`[9]` float64: the norms that divide the rows into tenths."""
    smallest_norm: float
    largest_norm: float

    @classmethod
    def refusing(cls, mean_D: Tensor, norms_N: np.ndarray, where: str) -> "LayerSurvey":
        """Like `of`, for rows that are to be measured.

        Args:
            where: whose rows they are, for the message.

        Raises:
            UserError: some rows are not finite, or all are zeros.
        """
        refuse_not_finite(norms_N, where)
        if not norms_N.any():
            raise UserError(f"{where}: all {len(norms_N):,} rows are zeros, so there is nothing to reconstruct")
        return cls.of(mean_D, norms_N)

    @classmethod
    def of(cls, mean_D: Tensor, norms_N: np.ndarray) -> "LayerSurvey":
        """The survey, from the mean and the norms of all rows."""
        edges = np.quantile(norms_N, np.arange(1, 10) / 10)
        return cls(mean_D.double(), float(np.median(norms_N)), torch.from_numpy(edges), float(norms_N.min()),
                   float(norms_N.max()))

    @property
    def outlier_norm(self) -> float:
        return OUTLIER * self.median_norm


def refuse_not_finite(norms_N: np.ndarray, where: str) -> None:
    """Refuse rows that are not finite: they have no mean, and so no figures.

    Raises:
        UserError: there are such rows.
    """
    if bad := int((~np.isfinite(norms_N)).sum()):
        raise UserError(f"{where}: {bad:,} of {len(norms_N):,} rows are NaN or infinite; try another precision of the "
                        "model (float32)")


class TokenFacts:
    """Facts about each token, as tensors."""

    def __init__(self, sequences: Sequences) -> None:
        self.documents = int(sequences.documents.max()) + 1
        self.groups = min(self.documents, MOST_GROUPS)
        self._group_N = torch.from_numpy(sequences.documents % self.groups)
        self._position_N = torch.from_numpy(sequences.positions())
        self._special_N = torch.from_numpy(sequences.special)
        self._part_N = torch.from_numpy(sequences.parts)

    def at(self, index_R: Tensor) -> "RowFacts":
        """The facts about some tokens."""
        return RowFacts(self._group_N[index_R], self._position_N[index_R], self._special_N[index_R],
                        self._part_N[index_R])


@dataclass(frozen=True)
class RowFacts:
    """Facts about the rows of a batch, on the CPU."""

    group_R: Tensor
    position_R: Tensor
    special_R: Tensor
    part_R: Tensor

    def masks(self, norm_R: Tensor, survey: LayerSurvey) -> Tensor:
        """Which rows are in which subset, `[S, R]` bool.

        Args:
            norm_R: norms of the rows, on the CPU.
        """
        plain_R, later_R = ~self.special_R, self.position_R >= FIRST_POSITIONS
        usual_R = norm_R <= survey.outlier_norm
        return torch.stack([torch.ones_like(plain_R), plain_R, later_R, usual_R, plain_R & later_R & usual_R,
                            *(self.part_R == code for code in range(1, len(PARTS)))])


class Sums:
    """float64 sums of quantities over rows, for each subset and group of documents.

    Rows are added one after another, so the sums do not depend on how the rows are split into batches.
    """

    def __init__(self, quantities: Sequence[str], groups: int) -> None:
        self.quantities = tuple(quantities)
        self.table_SGQ = torch.zeros(len(SUBSETS), groups, len(quantities), dtype=torch.float64)

    def add(self, values: dict[str, Tensor], group_R: Tensor, masks_SR: Tensor) -> None:
        """Add rows.

        Args:
            values: `[R]` for each quantity.
        """
        values_RQ = torch.stack([values[name].double().cpu() for name in self.quantities], dim=1)
        place_RQ = group_R[:, None] * len(self.quantities) + torch.arange(len(self.quantities))
        for table_GQ, mask_R in zip(self.table_SGQ.numpy(), masks_SR, strict=True):
            np.add.at(table_GQ.reshape(-1), place_RQ[mask_R].flatten().numpy(), values_RQ[mask_R].flatten().numpy())

    def total(self, subset: str) -> dict[str, float]:
        """The sums of a subset over all documents."""
        total_Q = self.table_SGQ[SUBSETS.index(subset)].sum(0)
        return dict(zip(self.quantities, total_Q.tolist(), strict=True))
