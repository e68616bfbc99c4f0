"""The rows that an audit looks at: those of the SAEs' own sites and of nearby sites, from one pass of the model.

N tokens of the text, P of them probed, R rows of a batch, D width of a site.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.evaluate.sequences import Sequences
from olmoscope.evaluate.subsets import FIRST_POSITIONS, LayerSurvey
from olmoscope.model.capture import read_sites
from olmoscope.model.load import LoadedModel
from olmoscope.model.sites import Place, inner_sites
from olmoscope.progress import bar
from olmoscope.site import EMBED, PARTS, Site

PROBED = 1024
"""Rows on which other readings are tried: see `audit_warnings.MUCH_BETTER` for what they must tell apart."""
LAYERS_AWAY = 2
"""How many layers away the same place is tried: layers counted from 1, or an index of `hidden_states`, are off by
one."""


@dataclass(frozen=True)
class AuditRows:
    """Rows of sites.

    Attributes:
        own: all N rows of the sites that an SAE reads or writes, `[N, D]` float32.
        probed: P rows of each site that is tried, the SAEs' own sites included.
        surveys: mean and norms of the rows of `own`.
        usual_P: for each site, which probed rows have no outlier norm there.
    """

    own: Mapping[Site, Tensor]
    probed: Mapping[Site, Tensor]
    surveys: Mapping[Site, LayerSurvey]
    usual_P: Mapping[Site, Tensor]


def beside(site: Site, layers: int) -> list[Site]:
    """The sites for which this one may be mistaken, without itself: the other places of its layer, the outputs of the
    layers around it, and the same place up to `LAYERS_AWAY` layers away.

    Args:
        layers: number of layers of the model.
    """
    if site == EMBED:
        return [Site(layer) for layer in range(min(LAYERS_AWAY, layers))]
    found = {Site(site.layer, part) for part in PARTS} | {Site(site.layer - 1), Site(site.layer + 1)}
    for away in range(1, LAYERS_AWAY + 1):
        found |= {Site(site.layer - away, site.part), Site(site.layer + away, site.part)}
    return sorted(one for one in found - {site} if one.layer < layers and (one.layer >= 0 or one == EMBED))


def existing(model: LoadedModel, wanted: Iterable[Site]) -> dict[Site, Place]:
    """The places of those sites that the model has; a layer that is not a plain sum has no inner sites."""
    found: dict[Site, Place] = dict(model.sites.places)
    wanted = set(wanted)
    for site in wanted - found.keys():
        if site == EMBED:
            found[site] = Place(site, "input", model.layers[0])
        elif site.is_layer_output:
            found[site] = Place(site, "output", model.layers[site.layer])
    for layer in sorted({site.layer for site in wanted - found.keys()}):
        try:
            inner = inner_sites(model.module, model.layers, [layer], model.name, model.vocabulary)
        except UserError:  # the layer has no such site, so there is nothing to try
            continue
        found |= {site: place for site, place in inner.places.items() if site not in found}
    return {site: place for site, place in found.items() if site in wanted}


@torch.no_grad()
def read_rows(model: LoadedModel, sequences: Sequences, batch_tokens: int, own: Iterable[Site],
              tried: Mapping[Site, Place]) -> AuditRows:
    """Run the model over the tokens once, up to the last site.

    Args:
        tried: all sites whose rows are wanted, including those of `own`.

    Raises:
        UserError: the rows of an SAE's own site are not finite, or all zeros.
    """
    own = set(own)
    later = np.flatnonzero(~sequences.special & (sequences.positions() >= FIRST_POSITIONS))
    if not len(later):
        raise UserError("every token of the text is special or the first of its sequence; give a longer text")
    chosen = later[np.linspace(0, len(later) - 1, min(PROBED, len(later))).astype(int)]
    slot_N = torch.full((sequences.rows,), -1)
    slot_N[torch.from_numpy(chosen)] = torch.arange(len(chosen))
    kept: dict[Site, Tensor] = {}
    probed: dict[Site, Tensor] = {}
    with bar("reading sites", sequences.rows, "tokens") as advance:
        for numbers in sequences.plan(batch_tokens):
            batch = sequences.batch(numbers)
            positions_BT = None if batch.positions_BT is None else batch.positions_BT.to(model.device)
            outputs = read_sites(model.module, list(tried.values()), batch.token_ids_BT.to(model.device), positions_BT)
            slot_R = slot_N[batch.index_R]
            for site in tried:
                x_RD = outputs.pop(site).flatten(0, 1)[batch.real_R.to(model.device)].float().cpu()
                width, there_R = x_RD.shape[1], slot_R >= 0
                probed.setdefault(site, torch.zeros(len(chosen), width))[slot_R[there_R]] = x_RD[there_R]
                if site in own:
                    kept.setdefault(site, torch.zeros(sequences.rows, width))[batch.index_R] = x_RD
            advance(len(batch.index_R))
    surveys = {site: LayerSurvey.refusing(x_ND.double().mean(0), x_ND.double().norm(dim=1).numpy(),
                                          f"{model.name}, {site}") for site, x_ND in kept.items()}
    norms = {site: x_PD.norm(dim=1) for site, x_PD in probed.items()}
    usual = {site: norm_P <= (surveys[site].outlier_norm if site in surveys
                              else LayerSurvey.of(torch.zeros(1), norm_P.double().numpy()).outlier_norm)
             for site, norm_P in norms.items()}
    return AuditRows(kept, probed, surveys, usual)
