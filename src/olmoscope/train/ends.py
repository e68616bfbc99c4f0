"""The input and the target of a coder in training: rows of the sites that it reads and writes.

An SAE reads and writes the rows of one site, unchanged except for attention sinks (sae/sinks.py). A transcoder reads
the rows of one site and is compared with those of another. A crosscoder's rows are those of several sites joined.

Sites differ in the size of their rows. So that learning rates mean the same for all parameters, the rows read are first
multiplied by a factor for each site. A transcoder's factor brings them to the size of the rows written; a crosscoder's
factors bring all sites to one size. The size is that of the median row, so outliers do not count. Checkpoints hold the
factors, and loading a coder folds them into its weights (sae/scales.py).

With `train.axes: principal` an SAE's rows are rotated to their principal axes (train/axes.py); checkpoints hold these
axes, and loading folds them in, too (sae/axes.py).

Shapes: B rows, D width of all sites read, D_out width of the site written.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from olmoscope.recipe.schema import CoderConfig
from olmoscope.sae.sinks import Sinks
from olmoscope.site import Site


@dataclass(frozen=True)
class Ends:
    """The sites of one coder in training."""

    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    widths: tuple[int, ...]
    """D of each site read."""
    scales: tuple[float, ...]
    """The factor for the rows of each site read."""
    sinks: Sinks | None = None
    """Attention sinks, which are removed from the rows before the trained latents see them; only SAEs of one site have
    them."""
    axes_DD: Tensor | None = None
    """The orthogonal matrix by which rows are multiplied; only SAEs of one site have one. None: rows are not rotated.
    """

    @property
    def is_transcoder(self) -> bool:
        """Whether the rows written come from another site than the rows read."""
        return self.reads != self.writes

    @property
    def is_plain(self) -> bool:
        """Whether it is an SAE of one site."""
        return len(self.reads) == 1 and not self.is_transcoder

    def rows(self, batch: Mapping[Site, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The rows read, `[B, D]`, and the target rows, `[B, D_out]`; the latter is None if they are the same rows.

        Args:
            batch: the rows of each site, in any float dtype.
        """
        if self.is_plain:
            x_BD = batch[self.reads[0]]
            if self.sinks is None:
                return self.turned(x_BD), None
            x_BD, target_BD = self.sinks.split(x_BD.float())
            return self.turned(x_BD), self.turned(target_BD)
        x_BD = self.joined([batch[site] for site in self.reads])
        return x_BD, batch[self.writes[0]].float() if self.is_transcoder else None

    def turned(self, rows: Tensor) -> Tensor:
        """Rows (or a mean) in coordinates along the axes, `[..., D]`."""
        return rows if self.axes_DD is None else rows.float() @ self.axes_DD

    def to(self, device: torch.device) -> "Ends":
        """The same on another device."""
        return replace(self, sinks=None if self.sinks is None else self.sinks.to(device),
                       axes_DD=None if self.axes_DD is None else self.axes_DD.to(device))

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows (or a mean) of the sites read, scaled and concatenated, `[..., sum of D]`."""
        return torch.cat([part.float() * scale for part, scale in zip(parts, self.scales, strict=True)], dim=-1)


def ends_of(spec: CoderConfig, widths: Mapping[Site, int], scales: Sequence[float],
            sinks: Sinks | None = None, axes_DD: Tensor | None = None) -> Ends:
    """The ends of a coder of a recipe.

    Args:
        widths: D of each site.
        scales: the factor of each site read.
    """
    reads = tuple(spec.reads)
    return Ends(reads, tuple(spec.writes or reads), tuple(widths[site] for site in reads), tuple(scales), sinks,
                axes_DD)


def scales_for(spec: CoderConfig, widths: Mapping[Site, int],
               median_norm: Callable[[Site], float]) -> tuple[float, ...]:
    """The factors for the rows of each site read; 1 for an SAE of one site.

    Args:
        median_norm: gives the median norm of a site's rows.
    """
    if len(spec.reads) == 1 and spec.writes is None:
        return (1.0,)
    sizes = {site: median_norm(site) / math.sqrt(widths[site]) for site in spec.sites}
    wanted = (sizes[spec.writes[0]] if spec.writes is not None
              else math.exp(sum(math.log(max(sizes[site], TINY)) for site in spec.reads) / len(spec.reads)))
    return tuple(wanted / sizes[site] if sizes[site] > TINY else 1.0 for site in spec.reads)


TINY = 1e-30
"""Rows of a smaller size are taken to be zeros."""
