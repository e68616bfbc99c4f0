"""Evaluation of several SAEs of one language model on the same tokens.

On a store, the figures of reconstruction are over all its rows as they are stored, and the language model reads the
first of its tokens for cross-entropy and KL. On a text, the model reads everything twice: once for what must be known
beforehand (the mean and the norms of each site), and once to measure. Shapes: R rows, D width of a site, S subsets.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from olmoscope.activations.store.format import norm_name
from olmoscope.activations.store.reader import Store
from olmoscope.activations.store.statistics import OUTLIER
from olmoscope.distributed.ranks import Ranks
from olmoscope.errors import UserError
from olmoscope.evaluate import bootstrap
from olmoscope.evaluate.dictionary import latents_measured, measure_dictionary
from olmoscope.evaluate.kept import KeptSums
from olmoscope.evaluate.language import Divergence, Replaced
from olmoscope.evaluate.measured import Measured, Written
from olmoscope.evaluate.reconstruction import RandomDirections
from olmoscope.evaluate.results import Dictionary, EvaluatedText, Evaluation, Subset
from olmoscope.evaluate.sequences import Sequences
from olmoscope.evaluate.subsets import FIRST_POSITIONS, SUBSETS, LayerSurvey, TokenFacts, refuse_not_finite
from olmoscope.model.capture import read_sites
from olmoscope.model.splice import CausalLM
from olmoscope.progress import bar
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.topk import TopK
from olmoscope.site import Site

ROWS_AT_ONCE = 4096
METHOD = 1
"""Incremented when the same SAE on the same tokens would get different figures."""


@dataclass(frozen=True)
class Setting:
    """What the SAEs are measured on.

    Attributes:
        sequences: the tokens.
        language_tokens: how many of them, from the first, the language model reads for cross-entropy and KL.
        batch_tokens: tokens in one pass of the model; no figure depends on it, except by rounding.
        name: the text's name, for people.
        dtype: the dtype in which the language model computes.
        folder: where to keep the sums of an unfinished evaluation.
        store: the `recipe_hash` of the store whose rows are measured; None for rows that the model computes now.
        ranks: the processes that share the work. All must evaluate the same; the first gets the results.
    """

    sequences: Sequences
    language_tokens: int
    batch_tokens: int
    name: str
    dtype: str
    folder: Path
    store: str | None = None
    ranks: Ranks = field(default_factory=Ranks.alone)


def identity(subject: Opened, model_revision: str, setting: Setting) -> str:
    """What an evaluation's figures depend on, except by rounding."""
    parts = [METHOD, setting.store, subject.identity, _place(subject.site), model_revision, setting.dtype,
             setting.sequences.hash(), setting.language_tokens, FIRST_POSITIONS, OUTLIER, bootstrap.RESAMPLES]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _sites_of(subjects: Sequence[Opened]) -> list[Site]:
    """All sites that some coder reads or writes."""
    return sorted({site for subject in subjects for site in (*subject.reads, *subject.writes)})


def _place(site: Site) -> int | str:
    """A site as identities name it: a residual stream by its layer's number, as before sites existed."""
    return site.layer if site.is_layer_output else str(site)


def evaluate_on_store(subjects: Sequence[Opened], store: Store, model: CausalLM, setting: Setting,
                      others: Mapping[str, CausalLM] = MappingProxyType({})) -> list[Evaluation]:
    """Evaluate SAEs on all rows of a store, and with the model on the first tokens.

    Args:
        setting: its sequences must be all those of the store.
        others: the other models whose sites crosscoders read, by the names that the sites have for them.

    Returns:
        The figures of each SAE; nothing on ranks other than the first.
    """
    sites, ranks = _sites_of(subjects), setting.ranks
    with ranks.agreed():
        norms = [store.read_rows(segment) for segment in range(len(store.segment_rows))]
        surveys = {site: LayerSurvey.refusing(store.mean(site), torch.cat(
            [rows[norm_name(site)] for rows in norms]).double().numpy(), f"{store.path}, {site}")
            for site in sites}
        work = _Work(subjects, surveys, {"": model, **others}, setting)
    starts_S = torch.from_numpy(setting.sequences.starts)

    def measure_rows(step: tuple[int, slice]) -> None:
        segment, part = step
        rows = norms[segment]
        facts = work.facts.at(starts_S[rows["sequence"][part].long()] + rows["position"][part])
        rows_of = {site: store.read(site, segment, part).to(model.device) for site in sites}
        for measured in work.measured:
            measured.reconstruct(rows_of, facts, count=True)

    steps = [(segment, slice(start, min(count, start + ROWS_AT_ONCE)))
             for segment, count in enumerate(store.segment_rows) for start in range(0, count, ROWS_AT_ONCE)]
    kept = work.kept("rows", work.tensors())
    kept.go_through(steps, lambda step: step[1].stop - step[1].start, measure_rows, "reconstruction")
    work.run_model(reconstruct=False)
    if not ranks.leads:
        return []
    return work.results(f"the {store.rows:,} rows of the store", [
        RandomDirections(one.width, one.directions(), seed=0).nmse(_first_rows(store, one.site),
                                                                   surveys[one.site].mean_D)
        for one in (measured.headline for measured in work.measured)])


def evaluate_on_text(subjects: Sequence[Opened], model: CausalLM, setting: Setting) -> list[Evaluation]:
    """Evaluate SAEs on tokens that the model reads now; ranks other than the first get no results."""
    surveys = _survey(_sites_of(subjects), model, setting)
    with setting.ranks.agreed():
        work = _Work(subjects, surveys, {"": model}, setting)
    work.run_model(reconstruct=True)
    if not setting.ranks.leads:
        return []
    return work.results(f"the {setting.sequences.rows:,} tokens of the text", [None] * len(subjects))


class _Work:
    """The sums of all SAEs, and the passes through the model."""

    def __init__(self, subjects: Sequence[Opened], surveys: dict[Site, LayerSurvey], models: Mapping[str, CausalLM],
                 setting: Setting) -> None:
        """
        Args:
            models: by the names that sites have for them; the coders' own model has an empty name.
        """
        self.subjects, self.surveys, self.setting = subjects, surveys, setting
        self.models = {name: models[name] for name in sorted({site.model for site in surveys} | {""})}
        for model in self.models.values():
            model.probe.refuse_leak(model.name, "apart" if setting.sequences.apart else "share")
        self.model = model = models[""]
        self.facts = TokenFacts(setting.sequences)
        self.places = {name: one.find(site.of("") for site in surveys if site.model == name).places
                       for name, one in self.models.items()}
        self.measured = [Measured.of(subject, model.device, surveys, self.facts.groups) for subject in subjects]

    def tensors(self) -> dict[str, Tensor]:
        """The sums of all reconstructions, by name."""
        return {f"{name}.{part}": tensor for name, one in self._written() for part, tensor
                in one.reconstruction.tensors().items()}

    def _written(self) -> list[tuple[str, Written]]:
        """All sites that some coder writes, each with a name of its own."""
        return [(f"{place}" if number == 0 else f"{place}.{number}", one)
                for place, measured in enumerate(self.measured) for number, one in enumerate(measured.writes)]

    def kept(self, name: str, tensors: dict[str, Tensor]) -> KeptSums:
        """Where sums are kept until the end."""
        subjects = [identity(subject, self.model.revision, self.setting) for subject in self.subjects]
        numbers = sum(tensor.numel() for tensor in tensors.values())  # another version may keep other sums
        return KeptSums(self.setting.folder, name, ":".join([str(self.setting.batch_tokens), str(numbers), *subjects]),
                        tensors, self.setting.ranks)

    def run_model(self, *, reconstruct: bool) -> None:
        """Let the model read the tokens: unchanged, and with every replacement at every site.

        Args:
            reconstruct: whether these rows also count in the figures of reconstruction.
        """
        read = self.setting.sequences.first(self.setting.language_tokens)
        next_N = torch.from_numpy(read.next_tokens())
        tensors = {f"{name}.language": one.language.sums.table_SGQ for name, one in self._written()}
        if reconstruct:
            tensors |= self.tensors()

        def measure(sequences: np.ndarray) -> None:
            self._measure_batch(read, sequences, next_N, reconstruct=reconstruct)

        self.kept("language", tensors).go_through(
            read.plan(self.setting.batch_tokens), lambda sequences: int(np.diff(read.starts)[sequences].sum()), measure,
            "language model")

    def _measure_batch(self, read: Sequences, sequences: np.ndarray, next_N: Tensor, *, reconstruct: bool) -> None:
        batch, model = read.batch(sequences), self.model
        token_ids_BT = batch.token_ids_BT.to(model.device)
        positions_BT = None if batch.positions_BT is None else batch.positions_BT.to(model.device)
        real_R = batch.real_R.to(model.device)
        facts = self.facts.at(batch.index_R)
        readings = {name: one.read(token_ids_BT, positions_BT, list(self.places[name].values()))
                    for name, one in self.models.items()}

        def go_on(site: Site, rows_RD: Tensor) -> Tensor:
            reading, place = readings[site.model], site.of("")
            replaced_ND = reading.at[place].flatten(0, 1).clone()
            replaced_ND[real_R] = rows_RD.to(replaced_ND.dtype)
            return self.models[site.model].go_on(self.places[site.model][place],
                                                 replaced_ND.view_as(reading.at[place]),
                                                 reading).flatten(0, 1)[real_R]

        passes = {name: [reading.hidden_BTD.flatten(0, 1)[real_R]] for name, reading in readings.items()}
        runs = []
        rows_of = {site.of(name): x_BTD.flatten(0, 1)[real_R] for name, reading in readings.items()
                   for site, x_BTD in reading.at.items()}
        baselines: dict[Site, int] = {}
        for site in sorted({one.site for _, one in self._written()}):
            x_RD, hidden = rows_of[site], passes[site.model]
            baselines[site] = len(hidden)
            hidden += [go_on(site, torch.zeros_like(x_RD)),
                       go_on(site, self.surveys[site].mean_D.to(x_RD).expand_as(x_RD))]
        for measured in self.measured:
            parts = measured.reconstruct(rows_of, facts, count=reconstruct)
            for one, xhat_RD in zip(measured.writes, parts, strict=True):
                zero, hidden = baselines[one.site], passes[one.site.model]
                spliced = kept = len(hidden)
                hidden.append(go_on(one.site, xhat_RD))
                x_RD = rows_of[one.site]
                outlier_R1 = x_RD.double().norm(dim=1, keepdim=True) > self.surveys[one.site].outlier_norm
                if outlier_R1.any():
                    kept = len(hidden)
                    hidden.append(go_on(one.site, torch.where(outlier_R1, x_RD, xhat_RD.to(x_RD.dtype))))
                runs.append((one, Replaced(spliced, kept, zero, zero + 1)))
        divergences = {name: Divergence(self.models[name], hidden, next_N[batch.index_R])
                       for name, hidden in passes.items() if len(hidden) > 1}
        for one, numbers in runs:
            masks_SR = facts.masks(rows_of[one.site].double().norm(dim=1).cpu(), self.surveys[one.site])
            one.language.add(divergences[one.site.model], numbers, facts, masks_SR)

    def results(self, mean_of: str, random: Sequence[float | None]) -> list[Evaluation]:
        """The content of evaluation.json, for each SAE."""
        saes = [measured.sae for measured in self.measured]
        with bar("decoder cosines", sum(latents_measured(sae.d_sae) for sae in saes), "latents") as advance:
            dictionaries = [measure_dictionary(sae, advance) for sae in saes]
        return [self._result(*each, mean_of) for each in zip(self.measured, random, dictionaries, strict=True)]

    def _result(self, measured: Measured, random: float | None, dictionary: Dictionary, mean_of: str) -> Evaluation:
        subject, sae, one = measured.subject, measured.sae, measured.headline
        subsets = {}
        for name in SUBSETS:
            if (figures := one.reconstruction.subset(name)) is not None:
                subsets[name] = Subset(**figures, language=one.language.subset(name))
        whole = subsets.pop("all")
        if whole.language is None:
            raise UserError(f"{self.setting.name}: no token has a next one, so there is nothing to predict; give a "
                            "longer text")
        if whole.fvu is None:
            raise UserError(f"{self.setting.name}: all rows of {one.site} are equal, so there is no "
                            "variance to explain; give another text")
        figures = whole.model_dump(exclude={"l0", "language"})
        return Evaluation(
            sae=subject.name, run_hash=subject.identity if subject.kind == "run" else None,
            files=dict(subject.files) or None,
            identity=identity(subject, self.model.revision, self.setting), store=self.setting.store,
            model=self.model.name, model_revision=self.model.revision,
            model_dtype=self.setting.dtype, site=one.site,
            reads=list(measured.reads) if measured.reads != (one.site,) else None, by_site=measured.by_site(),
            architecture=subject.architecture, d_model=sae.d_model, d_sae=sae.d_sae,
            k=sae.k if isinstance(sae, TopK) else None, normalize=sae.normalize,
            text=EvaluatedText(kind="store" if self.setting.store else "text", name=self.setting.name,
                      tokens_hash=self.setting.sequences.hash(),
                      documents=self.facts.documents, resampled=self.facts.groups, first_positions=FIRST_POSITIONS,
                      outlier_norm=self.surveys[one.site].outlier_norm, mean_of=mean_of),
            **figures, nmse_random_directions=random, language=whole.language,
            dictionary=dictionary, subsets=subsets, **one.reconstruction.distributions())


class _Survey:
    """Sums and norms of each site's rows."""

    def __init__(self, widths: Mapping[Site, int], rows: int) -> None:
        self.sum_D = {site: torch.zeros(width, dtype=torch.float64) for site, width in widths.items()}
        self.norm_N = {site: torch.zeros(rows, dtype=torch.float64) for site in widths}

    def tensors(self) -> dict[str, Tensor]:
        return ({f"{site}.sum": tensor for site, tensor in self.sum_D.items()}
                | {f"{site}.norm": tensor for site, tensor in self.norm_N.items()})


def _survey(sites: list[Site], model: CausalLM, setting: Setting) -> dict[Site, LayerSurvey]:
    """Mean and norms of all rows of each site; the model runs up to the deepest of them."""
    sequences, found = setting.sequences, model.find(sites)
    survey = _Survey(found.widths, sequences.rows)

    def look(numbers: np.ndarray) -> None:
        batch = sequences.batch(numbers)
        positions_BT = None if batch.positions_BT is None else batch.positions_BT.to(model.device)
        outputs = read_sites(model.body, list(found.places.values()), batch.token_ids_BT.to(model.device), positions_BT)
        for site, output_BTD in outputs.items():
            x_RD = output_BTD.flatten(0, 1)[batch.real_R.to(model.device)].double()
            survey.sum_D[site] += x_RD.sum(0).cpu()
            norm_R = x_RD.norm(dim=1).cpu()
            refuse_not_finite(norm_R.numpy(), f"{model.name}, {site}")
            survey.norm_N[site][batch.index_R] = norm_R

    parts = [*(str(_place(site)) for site in sites), model.revision, sequences.hash(), str(setting.batch_tokens)]
    kept = KeptSums(setting.folder, "survey", ":".join(parts), survey.tensors(), setting.ranks)
    kept.go_through(sequences.plan(setting.batch_tokens), lambda numbers: int(np.diff(sequences.starts)[numbers].sum()),
                    look, "survey")
    with setting.ranks.agreed():
        return {site: LayerSurvey.refusing(survey.sum_D[site] / sequences.rows, survey.norm_N[site].numpy(),
                                           f"{model.name}, {site}") for site in sites}


def forget_unfinished(folder: Path) -> None:
    """Delete the kept sums, once the results are written."""
    for path in folder.glob(".unfinished-*.safetensors"):
        path.unlink()


def _first_rows(store: Store, site: Site) -> Tensor:
    """Up to ROWS_AT_ONCE rows, the same number from every segment."""
    share = ROWS_AT_ONCE // len(store.segment_rows) + 1
    return torch.cat([store.read(site, segment, slice(0, min(rows, share)))
                      for segment, rows in enumerate(store.segment_rows)])
