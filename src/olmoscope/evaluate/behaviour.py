"""What an SAE's latents are good for besides reconstruction: measured on request and added to evaluation.json."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from olmoscope.errors import UserError
from olmoscope.evaluate.absorption import absorption_identity, measure_absorption, truth_probes
from olmoscope.evaluate.first_letter import first_letter_task, rows_of_words
from olmoscope.evaluate.labelled import read_tables
from olmoscope.evaluate.probing import Probed, measure_probing, missing_tables, probing_of
from olmoscope.evaluate.results import EVALUATION, Evaluation, read_evaluation, write_evaluation
from olmoscope.model.load import LoadedModel, load_model
from olmoscope.model_source import revision_of
from olmoscope.recipe.schema import Model
from olmoscope.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Behaviour:
    """Which measurements to make.

    Attributes:
        probing: sparse probing (probing.py).
        tables: which labelled tables (`read_tables`); None: the default number.
        folder: where the labelled tables are; None: those of the installed package.
        absorption: feature absorption in first letters (absorption.py).
    """

    probing: bool = False
    tables: str | None = None
    folder: Path | None = None
    absorption: bool = False

    def __post_init__(self) -> None:
        if not self.probing and (self.tables is not None or self.folder is not None):
            raise UserError(f"--probing-{'data' if self.tables is None else 'sets'} does nothing without --probing")


NOTHING_MORE = Behaviour()


def measure_behaviour(evaluated: Sequence[Probed], model: Model, tokenizer: Tokenizer, batch_tokens: int,
                      device: torch.device, wanted: Behaviour) -> None:
    """Make the wanted measurements on evaluated SAEs of one language model, and add them to each evaluation.json.

    Args:
        model: at the revision with which the SAEs were evaluated.
        batch_tokens: tokens in one pass of the model.

    Raises:
        UserError: no tables, or a coder that cannot be measured in this way.
    """
    for one in evaluated:
        _refuse(one, wanted)
    reader = " ".join(map(str, (revision_of(model), model.dtype, *tokenizer.begin)))
    sites = sorted({site for one in evaluated for site in one.subject.reads})
    loaded = cache(lambda: load_model(model.model_copy(update={"compile": False}), sites, device))
    if wanted.probing:
        tables = read_tables(wanted.folder, wanted.tables)
        if pending := [one for one in evaluated if missing_tables(one, reader, tables)]:
            measure_probing(pending, tables, reader, loaded(), tokenizer, batch_tokens)
        for one in evaluated:
            _add(one, probing=probing_of(one, reader, tables))
    if wanted.absorption:
        _absorption(evaluated, reader, loaded, tokenizer)


def _refuse(one: Probed, wanted: Behaviour) -> None:
    sae, name = one.subject.sae, one.subject.name
    if others := sorted({site.model for site in one.subject.reads if site.model}):
        raise UserError(f"--{'probing' if wanted.probing else 'absorption'}: {name} reads other models too "
                        f"({', '.join(others)}), but only one model reads the texts; leave it out")
    if wanted.absorption and (sae.transcoder or len(one.subject.reads) > 1):
        raise UserError(f"--absorption: {name} is not an SAE of one site, and absorption needs decoder directions at "
                        "the site that the probe reads; leave it out")


def _absorption(evaluated: Sequence[Probed], reader: str, loaded: Callable[[], LoadedModel],
                tokenizer: Tokenizer) -> None:
    identities = [absorption_identity(one.subject, reader) for one in evaluated]
    pending = [(one, identity) for one, identity in zip(evaluated, identities, strict=True)
               if (found := _evaluation(one).absorption) is None or found.identity != identity]
    if not pending:
        return
    model, task = loaded(), first_letter_task(tokenizer)
    rows_of = rows_of_words(model, task, tokenizer.begin)
    probes = cache(lambda site: truth_probes(rows_of[site], task))
    for one, identity in pending:
        site = one.subject.site
        _add(one, absorption=measure_absorption(one.subject.sae.to(model.device), rows_of[site], task, probes(site),
                                                identity))


def _evaluation(one: Probed) -> Evaluation:
    return read_evaluation(one.folder / EVALUATION)


def _add(one: Probed, **figures: Any) -> None:
    before = _evaluation(one)
    after = before.model_copy(update=figures)
    if after != before:
        write_evaluation(one.folder / EVALUATION, after)
