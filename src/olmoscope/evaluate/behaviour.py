"""What an SAE's latents are good for, beside reconstruction: measured where it is asked for, into evaluation.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from olmoscope.errors import UserError
from olmoscope.evaluate.labelled import read_tables
from olmoscope.evaluate.probing import Probed, measure_probing, missing_tables, probing_of
from olmoscope.evaluate.results import EVALUATION, read_evaluation, write_evaluation
from olmoscope.model.load import load_model
from olmoscope.model_source import revision_of
from olmoscope.recipe.schema import Model
from olmoscope.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Behaviour:
    """What is asked for.

    Attributes:
        probing: sparse probing (probing.py).
        tables: which labelled tables (`read_tables`); None: some.
        folder: of labelled tables; None: those of the installed package.
    """

    probing: bool = False
    tables: str | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        if not self.probing and (self.tables is not None or self.folder is not None):
            raise UserError(f"--probing-{'data' if self.tables is None else 'sets'} does nothing without --probing")


NOTHING_MORE = Behaviour()


def measure_behaviour(evaluated: Sequence[Probed], model: Model, tokenizer: Tokenizer, batch_tokens: int,
                      device: torch.device, wanted: Behaviour) -> None:
    """Measure what is wanted of evaluated SAEs of one language model, and add it to their evaluation.json.

    Args:
        model: at the revision that the SAEs were evaluated with.
        batch_tokens: in one pass of the model.

    Raises:
        UserError: no tables, or a crosscoder that reads other models too.
    """
    if not wanted.probing:
        return
    for one in evaluated:
        if others := sorted({site.model for site in one.subject.reads if site.model}):
            raise UserError(f"--probing: {one.subject.name} reads other models too ({', '.join(others)}), and the "
                            "tables are read by one; leave it out")
    tables = read_tables(wanted.folder, wanted.tables)
    reader = " ".join(map(str, (revision_of(model), model.dtype, *tokenizer.begin)))
    if pending := [one for one in evaluated if missing_tables(one, reader, tables)]:
        sites = sorted({site for one in pending for site in one.subject.reads})
        loaded = load_model(model.model_copy(update={"compile": False}), sites, device)
        measure_probing(pending, tables, reader, loaded, tokenizer, batch_tokens)
    for one in evaluated:
        path = one.folder / EVALUATION
        before = read_evaluation(path)
        after = before.model_copy(update={"probing": probing_of(one, reader, tables)})
        if after != before:
            write_evaluation(path, after)
