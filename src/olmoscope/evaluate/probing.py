"""Sparse probing: how well a few latents distinguish the classes of labelled texts.

    probing.json, beside evaluation.json     the probes of each table; those in the file are not measured again

For each table, probes are trained on the rows at the last token of each text: on the activations that the SAE reads,
and on the k latents whose means differ most between the classes. The selection of latents, the sizes of the classes and
the choice of the penalty are those of sae-probes (arXiv 2502.16681); the solver is our own and goes to the optimum.
Shapes: N texts, M of them to train on, D width read, F latents.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olmoscope.errors import UserError
from olmoscope.evaluate import bootstrap
from olmoscope.evaluate.behaviour_results import ProbeFigures, Probing
from olmoscope.evaluate.labelled import Table, Tables
from olmoscope.evaluate.last_rows import last_rows
from olmoscope.evaluate.logistic import accuracy, area_under_curve, fit
from olmoscope.files import read_json, write_json
from olmoscope.model.load import LoadedModel
from olmoscope.progress import bar
from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.io.opened import Opened
from olmoscope.tokens.tokenizer import Tokenizer

PROBING = "probing.json"
FORMAT, VERSION = "olmoscope probing", 1
METHOD = 1
"""Incremented when the same SAE on the same tables would get different figures."""
LATENTS = (1, 5, 16)
"""Values of k of the sparse probes."""
PENALTIES = tuple(10.0 ** np.linspace(-5, 5, 10))
"""Values of C tried for the logistic regressions, as in sae-probes."""
VALIDATION = (0.2, 100)
"""Share of the training texts that chooses among penalties, and their largest number."""
CONTEXT = 1024
"""Most tokens of a text that are read: its last ones."""


@dataclass(frozen=True)
class Probed:
    """An SAE to probe, and the folder of its evaluation."""

    subject: Opened
    folder: Path


def missing_tables(probed: Probed, reader: str, tables: Tables) -> list[Table]:
    """The tables whose probes are not in the folder yet."""
    kept = _kept(probed, reader)
    return [table for table in tables.tables if kept.get(table.name, {}).get("content") != table.content]


def measure_probing(subjects: Sequence[Probed], tables: Tables, reader: str, model: LoadedModel,
                    tokenizer: Tokenizer, batch_tokens: int) -> None:
    """Train the missing probes and write them, table by table.

    Args:
        reader: identifies the model and how it reads texts.
        model: with all sites that the SAEs read.
    """
    missing = {table.name: table for one in subjects
               for table in missing_tables(one, reader, tables)}
    for number, table in enumerate(missing.values(), 1):
        train, test = table.split()
        ids = token_ids_of(tokenizer, table, [*train, *test])
        with bar(f"probing {number}/{len(missing)}, {table.name}"[:44], sum(map(len, ids)), "tokens") as advance:
            rows_of = last_rows(model, ids, batch_tokens, advance)
        y_N = torch.tensor([table.labels[row] for row in (*train, *test)], device=model.device)
        baselines: dict[Any, dict[str, float]] = {}
        for one in subjects:
            reads = one.subject.reads
            x_ND = torch.cat([rows_of[site] for site in reads], dim=1)
            if reads not in baselines:
                baselines[reads] = _probe(x_ND, y_N, len(train))
            codes = one.subject.sae.to(model.device).encode(x_ND)
            order_F = by_difference(codes, y_N, len(train))
            figures = {k: {"latents": order_F[:k].tolist(), **_probe(values_of(codes, order_F[:k]), y_N, len(train))}
                       for k in LATENTS}
            kept = _kept(one, reader)
            kept[table.name] = {"content": table.content, "train": len(train), "test": len(test), "k": figures,
                                "activations": baselines[reads]}
            write_json(one.folder / PROBING, {"format": FORMAT, "version": VERSION, "identity": _identity(
                one, reader), "tables": kept})


def token_ids_of(tokenizer: Tokenizer, table: Table, rows: Sequence[int]) -> list[np.ndarray]:
    """The tokens of some texts of a table, as the model reads them.

    Raises:
        UserError: a text has no tokens.
    """
    ids = [np.array([*tokenizer.begin, *encoded[:-1][len(tokenizer.begin) - CONTEXT :]], dtype=np.int64)
           for encoded in tokenizer.encode([table.texts[row] for row in rows])]
    if not all(map(len, ids)):
        raise UserError(f"table {table.name} has a text without tokens; remove it")
    return ids


def by_difference(codes: SparseCodes, y_N: Tensor, train: int) -> Tensor:
    """Latents `[F]` ranked by |mean over class 1 − mean over class 0| on the first `train` rows, largest first, in
    units of the latent's mean over the rows on which it is active."""
    values_MK, indices_MK = codes.values[:train].double(), codes.indices[:train]
    classes = torch.stack([~y_N[:train], y_N[:train]])

    def sums(values_MK: Tensor) -> Tensor:
        return values_MK.new_zeros(codes.d_sae).scatter_add_(0, indices_MK.flatten(), values_MK.flatten())

    means_2F = torch.stack([sums(values_MK * rows_M[:, None]) / rows_M.sum() for rows_M in classes])
    active_F = sums((values_MK != 0).double())
    typical_F = sums(values_MK.abs()) / active_F.clamp_min(1)
    difference_F = (means_2F[1] - means_2F[0]).abs() / torch.where(active_F > 0, typical_F, 1)
    return difference_F.argsort(descending=True, stable=True)


def values_of(codes: SparseCodes, latents_L: Tensor) -> Tensor:
    """Activations of some latents, `[N, L]`."""
    return torch.stack([(codes.values * (codes.indices == latent)).sum(1) for latent in latents_L], dim=1)


def _probe(x_NP: Tensor, y_N: Tensor, train: int) -> dict[str, float]:
    """AUC and accuracy on the rows from `train` on. The probe has the penalty that is best on some of the rows
    before."""
    chosen = train - min(int(VALIDATION[0] * train), VALIDATION[1])
    probe, best, best_area = None, PENALTIES[0], -1.0
    for C in PENALTIES:
        probe = fit(x_NP[:chosen], y_N[:chosen], C, probe)
        area = area_under_curve(probe(x_NP[chosen:train]), y_N[chosen:train])
        if area >= best_area:  # among equal areas, the weakest penalty
            best, best_area = C, area
    score_N = fit(x_NP[:train], y_N[:train], best)(x_NP[train:])
    return {"auc": area_under_curve(score_N, y_N[train:]), "accuracy": accuracy(score_N, y_N[train:])}


def probing_of(probed: Probed, reader: str, tables: Tables) -> Probing:
    """Means over the tables; the folder must have the probes of them all."""
    kept = _kept(probed, reader)
    names = [table.name for table in tables.tables]
    return Probing(source=tables.source, tables=names,
                   latents={k: _means([kept[name]["k"][str(k)] for name in names]) for k in LATENTS},
                   activations=_means([kept[name]["activations"] for name in names]))


def _means(each: Sequence[Mapping[str, Any]]) -> ProbeFigures:
    figures = ("auc", "accuracy")
    table_GQ = torch.tensor([[1.0, *(one[name] for name in figures)] for one in each], dtype=torch.float64)
    means = (table_GQ.sum(0) / len(each)).tolist()[1:]
    intervals = bootstrap.intervals(table_GQ, ("tables", *figures),
                                    lambda sums: {name: sums[name] / sums["tables"] for name in figures})
    return ProbeFigures(**dict(zip(figures, means, strict=True)), intervals=intervals)


def _identity(probed: Probed, reader: str) -> str:
    parts = [METHOD, probed.subject.identity, *map(str, probed.subject.reads), reader]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _kept(probed: Probed, reader: str) -> dict[str, Any]:
    """The probes in the folder, by table; empty if they belong to another SAE or were measured in another way."""
    path = probed.folder / PROBING
    found = read_json(path) if path.exists() else {}
    return dict(found["tables"]) if found.get("identity") == _identity(probed, reader) else {}
