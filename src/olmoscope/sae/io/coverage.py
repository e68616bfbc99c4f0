"""Count the dictionaries in SAELens' registry whose format is read here. Nothing is downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from olmoscope.sae.io import (
    circuit_tracer,
    clt,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    hook_z,
    llama_scope,
    qwen_scope,
    saelens,
    sparsify,
)
from olmoscope.sae.io.formats import Format
from olmoscope.sae.io.registry import entries

READERS: Mapping[str | None, Format] = {
    None: saelens, "gemma_2": gemma_scope, "gemma_2_transcoder": gemma_scope, "gemma_3": gemma_scope_2,
    "dictionary_learning_1": dictionary_learning, "qwen_scope": qwen_scope, "mwhanna_transcoder": circuit_tracer,
    "llama_scope": llama_scope, "llama_scope_r1_distill": llama_scope, "mntss_clt_layer_transcoder": clt,
    "connor_rob_hook_z": hook_z, "goodfire": goodfire, "deepseek_r1": goodfire, "sparsify": sparsify}
"""The format for each of SAELens' loaders (None: its own format)."""


@dataclass(frozen=True)
class Covered:
    """The dictionaries of one loader.

    Attributes:
        loader: its name in SAELens; None for SAELens' own format.
        format: the name of the format here; None if it is not read.
        releases, dictionaries: their numbers.
    """

    loader: str | None
    format: str | None
    releases: int
    dictionaries: int


def coverage() -> list[Covered]:
    """All loaders in the registry, the one with most dictionaries first.

    Raises:
        UserError: SAELens is not installed.
    """
    found = []
    by_loader = sorted(entries(), key=lambda entry: entry.loader or "")
    for loader, group in groupby(by_loader, key=lambda entry: entry.loader):
        of_loader = list(group)
        form = READERS.get(loader)
        found.append(Covered(loader, None if form is None else form.NAME.partition(" ")[2],
                             len({entry.release for entry in of_loader}), len(of_loader)))
    return sorted(found, key=lambda covered: -covered.dictionaries)
