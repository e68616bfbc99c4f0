"""`olmoscope audit SAE...`: whether SAEs do what their files say, and if not, what is likely to be wrong.

Each SAE is measured as it is read, and then tried at the sites beside its own and with other conventions
(audit_variants.py). If another reading fits much better, it names the mistake. The model runs once for all of its SAEs,
and no further than two layers past their last site.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from olmoscope.activations.store.outliers import Outliers
from olmoscope.evaluate.anywhere import Options, by_model, nearby_text, sequences_of, subjects_of
from olmoscope.evaluate.audit_rows import AuditRows, beside, existing, read_rows
from olmoscope.evaluate.audit_variants import variants
from olmoscope.evaluate.audit_warnings import AuditWarning, Found, Tried, warnings_of
from olmoscope.evaluate.measured import Measured
from olmoscope.evaluate.reconstruction import Reconstruction
from olmoscope.evaluate.subsets import TokenFacts
from olmoscope.files import locked
from olmoscope.model.config import read_config, width_and_depth
from olmoscope.model.load import load_model, pick_device
from olmoscope.progress import bar
from olmoscope.recipe.schema import Model
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.directions import unit_directions
from olmoscope.sae.io.open import find_saes, look_at
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.reading import Reading
from olmoscope.site import Site, deepest

ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Audit:
    """The verdict on one SAE. An unknown figure is None.

    Attributes:
        name: the SAE's name.
        format, convention: how it was read; the convention is the lines of a formula.
        model, reads, writes: its language model, and the sites that it reads and writes.
        architecture, d_sae, d_in: its kind and its sizes.
        rows: tokens that it was measured on.
        l0: mean number of active latents per row.
        explained_variance: 1 − FVU over all rows, at the last site that it writes.
        explained_variance_ordinary: the same over ordinary rows (docs/metrics.md, subsets).
        dead: share of latents that fired on none of the rows.
        stated: the figures that its owner published, by name.
        outliers: the rows of outlier norm at that site, in words.
        outlier_nmse: NMSE on them.
        norm: median norm of the rows read.
        scale: the scale that fits best, in words; None where it makes no difference.
        twins: mean cosine of each latent's encoder and decoder rows; None for transcoders.
        fit: FVU on the probed rows, as read.
        tried: other readings, best first.
        warnings: what is likely to be wrong.
    """

    name: str
    format: str
    convention: tuple[str, ...]
    model: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    architecture: str
    d_sae: int
    d_in: int
    rows: int
    l0: float
    explained_variance: float | None
    explained_variance_ordinary: float | None
    dead: float
    stated: Mapping[str, float]
    outliers: str
    outlier_nmse: float | None
    norm: float
    scale: str | None
    twins: float | None
    fit: float | None
    tried: tuple[Tried, ...]
    warnings: tuple[AuditWarning, ...]


def audit(names: Sequence[str], options: Options) -> list[Audit]:
    """Audit SAEs.

    Args:
        names: see `find_saes`.
        options: `behaviour` is not used.

    Raises:
        UserError: an SAE, a model or a text cannot be loaded, or they do not fit each other.
    """
    addresses = [address for name in names for address in find_saes(name)]
    readings = [look_at(address, options.site)[1] for address in addresses]
    subjects = subjects_of(addresses, options)
    text = options.text or nearby_text(subjects)
    of = {subject.name: reading for subject, reading in zip(subjects, readings, strict=True)}
    done: dict[str, Audit] = {}
    with locked(options.out, "auditing"):
        for model, group in by_model(subjects, options, pick_device("auto")):
            done |= {one.name: one for one in _audit_group(group, of, model, text, options)}
    return [done[subject.name] for subject in subjects]


def _audit_group(subjects: list[Opened], readings: Mapping[str, Reading], wanted: Model, text: str,
                 options: Options) -> list[Audit]:
    """Audit all SAEs of one language model."""
    _, layers = width_and_depth(read_config(wanted), wanted)
    own = {site for subject in subjects for site in (*subject.reads, *subject.writes)}
    near = {other for site in own for other in beside(site, layers)}
    top = Site(min(deepest(own | near), layers - 1))
    model = load_model(wanted, sorted({*own, top}), pick_device("auto"))
    sequences = sequences_of(subjects, wanted, text, options, lambda: None).first(options.tokens)
    model.probe.refuse_leak(model.name, "apart" if sequences.apart else "share")
    rows = read_rows(model, sequences, options.batch_tokens, own, existing(model, own | near))
    facts = TokenFacts(sequences)
    with bar("auditing", len(subjects), "SAEs") as advance:
        found = []
        for subject in subjects:
            found.append(_audit_one(subject, readings[subject.name], model.device, rows, facts, layers, model.name))
            advance(1)
    return found


@torch.no_grad()
def _audit_one(subject: Opened, reading: Reading, device: torch.device, rows: AuditRows, facts: TokenFacts,
               layers: int, model: str) -> Audit:
    measured = Measured.of(subject, device, rows.surveys, facts.groups)
    count = len(rows.own[subject.site])
    for start in range(0, count, ROWS_AT_ONCE):
        part = torch.arange(start, min(count, start + ROWS_AT_ONCE))
        measured.reconstruct({site: rows.own[site][part].to(device) for site in (*subject.reads, *subject.writes)},
                             facts.at(part), count=True)
    figures = measured.headline.reconstruction
    whole, ordinary, spread = figures.subset("all"), figures.subset("ordinary"), figures.distributions()
    assert whole is not None  # a text without rows is refused earlier
    sae, survey = measured.sae, rows.surveys[subject.reads[0]]
    l0 = spread["l0"].mean
    fit, tried = _try(subject, sae, rows, survey.median_norm, l0, layers, device)
    twins = _twins(sae)
    explained = None if ordinary is None else ordinary["explained_variance"]
    found = Found(fit, tried, l0, sae.d_in, sae.d_sae, twins, explained, reading.stated)
    best = min((one for one in tried if one.cause == "scale" and one.fvu is not None), key=lambda one: one.fvu or 0.0,
               default=None)
    scale = None
    if best is not None and best.fvu is not None and fit is not None:
        scale = "rows as they are fit best of all scales tried" if fit <= best.fvu else f"{best.what} fit best"
    return Audit(subject.name, reading.format.partition(" ")[2], tuple(reading.formula()), model,
                 tuple(map(str, subject.reads)), tuple(map(str, subject.writes)), subject.architecture, sae.d_sae,
                 sae.d_in, count, l0, whole["explained_variance"], explained, spread["dead"].share,
                 dict(reading.stated), *_outliers(figures, spread), survey.median_norm, scale,
                 twins, fit, tried, warnings_of(found))


def _outliers(figures: Reconstruction, spread: Mapping[str, object]) -> tuple[str, float | None]:
    """The outlier rows in words, and the NMSE on them."""
    count, first, norm = figures.outliers_3.tolist()
    rows = int(figures.l0_counts.sum())
    found = spread["outlier_rows"]
    said = Outliers(rows, round(count), figures.survey.median_norm, round(first), norm / count if count else None,
                    getattr(found, "alike", None)).said()
    if not count:
        return said, None
    whole, usual = (figures.sums.total(name) for name in ("all", "without_outliers"))
    return said, (whole["nmse"] - usual["nmse"]) / count


def _try(subject: Opened, sae: SparseCoder, rows: AuditRows, norm: float, l0: float, layers: int,
         device: torch.device) -> tuple[float | None, tuple[Tried, ...]]:
    """FVU on the probed rows as read, and with all other readings; a crosscoder has no other readings.

    Only rows without an outlier norm at any of the sites tried count. So all readings are compared on the same rows,
    and rows of huge norm do not drown the others.
    """
    near: dict[Site, tuple[tuple[Site, ...], tuple[Site, ...]]] = {}
    if len(subject.reads) == 1:
        for site in beside(subject.reads[0], layers):
            near[site] = ((site,), subject.writes if sae.transcoder else (site,))
    width = {site: x_PD.shape[1] for site, x_PD in rows.probed.items()}
    near = {site: ends for site, ends in near.items() if width.get(site) == sae.d_in}
    usual_P = torch.stack([rows.usual_P[site] for site in {*subject.reads, *subject.writes, *near}]).all(dim=0)
    x_of = {site: rows.probed[site][usual_P] for site in {*subject.reads, *subject.writes, *near}}

    def fit(coder: SparseCoder, reads: Sequence[Site], writes: Sequence[Site]) -> float | None:
        return fvu(coder, *(torch.cat([x_of[site] for site in sites], dim=1).to(device) for sites in (reads, writes)))

    tried = [Tried("site", str(site), f"correct the site in its settings, to {site}, if it was trained there",
                   fit(sae, *ends)) for site, ends in near.items()]
    if len(subject.reads) == 1:
        tried += [Tried(one.cause, one.what, one.do, fit(one.coder, subject.reads, subject.writes))
                  for one in variants(sae, norm, l0)]
    tried.sort(key=lambda one: float("inf") if one.fvu is None else one.fvu)
    return fit(sae, subject.reads, subject.writes), tuple(tried)


def fvu(coder: SparseCoder, x_PD: Tensor, y_PO: Tensor) -> float | None:
    """Σ‖y − ŷ‖² / Σ‖y − μ‖² of rows y that the coder should write, from the rows that it reads; μ is their mean. None
    if it is not finite."""
    error = sum(float((y_BO.double() - coder.reconstruct(x_BD)[0].double()).square().sum())
                for x_BD, y_BO in zip(torch.split(x_PD, ROWS_AT_ONCE), torch.split(y_PO, ROWS_AT_ONCE), strict=True))
    variance = float((y_PO.double() - y_PO.double().mean(0)).square().sum())
    found = error / variance if variance else float("inf")
    return found if found < float("inf") else None


def _twins(sae: SparseCoder) -> float | None:
    """Mean cosine of a latent's encoder row with its decoder row; None for coders that write another site."""
    if sae.transcoder:
        return None
    return float((unit_directions(sae.W_enc) * unit_directions(sae.W_dec)).sum(1).double().mean())
