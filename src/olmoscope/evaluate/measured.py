"""A coder while it is measured: its sums for each site that it writes, and a crosscoder's figures for each site.

Shapes: R rows, D width of a site, F latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.evaluate.language import LanguageSums
from olmoscope.evaluate.reconstruction import Reconstruction
from olmoscope.evaluate.results import DecoderNorm, SiteFigures
from olmoscope.evaluate.subsets import LayerSurvey, RowFacts
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.topk import TopK
from olmoscope.site import Site


@dataclass(frozen=True)
class Written:
    """The sums of one site that a coder writes."""

    site: Site
    reconstruction: Reconstruction
    language: LanguageSums

    @property
    def width(self) -> int:
        """Width D of the site."""
        return len(self.reconstruction.survey.mean_D)

    def directions(self) -> int:
        """Number of random directions to compare with: the coder's active latents per row."""
        sae, sums = self.reconstruction.sae, self.reconstruction
        active = sae.k if isinstance(sae, TopK) else round(float(sums.fired_F.sum() / sums.l0_counts.sum()))
        return min(max(1, active), self.width)


@dataclass(frozen=True)
class Measured:
    """A coder, on the model's device, with its sums."""

    subject: Opened
    sae: SparseCoder
    reads: tuple[Site, ...]
    writes: tuple[Written, ...]

    @classmethod
    def of(cls, subject: Opened, device: torch.device, surveys: Mapping[Site, LayerSurvey], groups: int) -> "Measured":
        """A coder with empty sums.

        Args:
            surveys: the surveys of all sites that it reads and writes.
            groups: number of groups of documents.
        """
        sae = subject.sae.to(device)
        return cls(subject, sae, subject.reads, tuple(
            Written(site, Reconstruction(sae, surveys[site], groups, subject.name), LanguageSums(groups))
            for site in subject.writes))

    @property
    def headline(self) -> Written:
        """The site whose figures are the coder's own: the only one, or the last that a crosscoder writes in its own
        model, from which that model continues."""
        return [one for one in self.writes if not one.site.model][-1]

    def reconstruct(self, rows_of: Mapping[Site, Tensor], facts: RowFacts, count: bool) -> list[Tensor]:
        """The coder's reconstructions of rows, for each site that it writes.

        Args:
            rows_of: the rows of each site, `[R, D]`.
            count: whether the rows count in the figures of reconstruction.

        Raises:
            UserError: a reconstruction that counts is not finite.
        """
        read = [rows_of[site] for site in self.reads]
        y_RD, codes = self.sae.reconstruct(read[0] if len(read) == 1 else torch.cat(read, dim=1))
        parts = list(torch.split(y_RD, [one.width for one in self.writes], dim=1))
        if count:
            for one, part_RD in zip(self.writes, parts, strict=True):
                one.reconstruction.add_reconstruction(rows_of[one.site], part_RD, codes, facts)
        return parts

    def by_site(self) -> list[SiteFigures] | None:
        """The figures of each site that a crosscoder writes; None for any other coder."""
        if len(self.writes) == 1:
            return None
        norms = self._decoder_norms()
        found = []
        for one, norm_F in zip(self.writes, norms, strict=True):
            figures, language = one.reconstruction.subset("all"), one.language.subset("all")
            assert figures is not None and language is not None  # the headline site has been checked
            p5, p50, p95 = torch.quantile(norm_F, torch.tensor([0.05, 0.5, 0.95], dtype=norm_F.dtype)).tolist()
            found.append(SiteFigures(
                site=one.site, **{key: figures[key] for key in ("nmse", "fvu", "explained_variance", "cosine")},
                delta_ce=language.delta_ce, loss_recovered_zero=language.loss_recovered_zero, kl=language.kl,
                decoder_norm=DecoderNorm(mean=float(norm_F.mean()), p5=p5, p50=p50, p95=p95)))
        return found

    def _decoder_norms(self) -> list[Tensor]:
        """For each site, each latent's share of its decoder's length there, `[F]` from 0 to 1; lengths are in units of
        the site's median row, and the squares of a latent's shares add up to 1."""
        parts = torch.split(self.sae.W_dec.double().cpu(), [one.width for one in self.writes], dim=1)
        lengths = torch.stack([part.norm(dim=1) / one.reconstruction.survey.median_norm
                               for part, one in zip(parts, self.writes, strict=True)])
        whole_F = lengths.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        return list(lengths / whole_F)
