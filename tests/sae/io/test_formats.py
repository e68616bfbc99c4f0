"""The list of formats is complete, and files are recognised by their content, whatever their names."""

import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import foreign_files
import olmoscope.sae.io
from olmoscope.release.export import export_run
from olmoscope.sae.io import (
    circuit_tracer,
    clt,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    hook_z,
    llama_scope,
    llamascopium,
    openai,
    qwen_scope,
    reference_trainer,
    run_checkpoint,
    run_folder,
    saelens,
    sparsify,
)
from olmoscope.sae.io.formats import FORMATS
from olmoscope.sae.io.open import format_of
from olmoscope.sae.io.place import Here
from reference_checkpoint import checkpoint
from release_runs import RAW, make_out

FOREIGN = Path(__file__).parents[2] / "foreign"
REPO = "someone/anything"
"""A name without meaning: the content of the files decides the format."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """One of each format."""
    folder = tmp_path_factory.mktemp("formats")
    run = make_out(folder / "out") / "runs" / RAW
    torch.save(checkpoint(), folder / "trained.pt")
    kept = next((run / "checkpoints").iterdir())
    made = {
        gemma_scope: foreign_files.gemma_scope, gemma_scope_2: foreign_files.gemma_scope_2,
        llama_scope: foreign_files.llama_scope, qwen_scope: foreign_files.qwen_scope, hook_z: foreign_files.hook_z,
        goodfire: foreign_files.goodfire, circuit_tracer: foreign_files.circuit_tracer, clt: foreign_files.clt,
        openai: foreign_files.openai}
    return {run_folder: run, run_checkpoint: kept, saelens: export_run(run).folder,
            reference_trainer: folder / "trained.pt", sparsify: FOREIGN / "sparsify/topk/layers.3",
            dictionary_learning: FOREIGN / "dictionary_learning/AutoEncoder/trainer_0",
            llamascopium: FOREIGN / "llamascopium/relu",
            **{form: folder / form.__name__ / REPO / make(folder / form.__name__, repo=REPO)
               for form, make in made.items()}}


def test_every_module_of_a_format_is_in_the_list():
    names = [module.name for module in pkgutil.iter_modules(olmoscope.sae.io.__path__)]
    modules = [importlib.import_module(f"olmoscope.sae.io.{name}") for name in names]
    assert {module.__name__ for module in modules if hasattr(module, "detect")} == {
        form.__name__ for form in FORMATS}


def test_each_knows_its_own(places):
    assert set(places) == set(FORMATS)
    for form, place in places.items():
        assert format_of(Here(place)) is form


def test_an_empty_folder_is_of_no_format(tmp_path):
    assert not any(form.detect(Here(tmp_path)) for form in FORMATS)
