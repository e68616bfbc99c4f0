"""The list of formats is complete, and each format knows its own."""

import importlib
import pkgutil

import pytest
import torch

import olmoscope.sae.io
from olmoscope.release.export import export_run
from olmoscope.sae.io import reference_trainer, run_checkpoint, run_folder, saelens
from olmoscope.sae.io.formats import FORMATS
from olmoscope.sae.io.open import format_of
from olmoscope.sae.io.place import Here
from reference_checkpoint import checkpoint
from release_runs import RAW, make_out


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """One of each format."""
    folder = tmp_path_factory.mktemp("formats")
    run = make_out(folder / "out") / "runs" / RAW
    torch.save(checkpoint(), folder / "trained.pt")
    kept = next((run / "checkpoints").iterdir())
    return {run_folder: run, run_checkpoint: kept, saelens: export_run(run).folder,
            reference_trainer: folder / "trained.pt"}


def test_every_module_of_a_format_is_in_the_list():
    names = [module.name for module in pkgutil.iter_modules(olmoscope.sae.io.__path__)]
    modules = [importlib.import_module(f"olmoscope.sae.io.{name}") for name in names]
    assert {module.__name__ for module in modules if hasattr(module, "detect")} == {
        form.__name__ for form in FORMATS}


def test_each_knows_its_own(places):
    assert set(places) == set(FORMATS)
    for form, place in places.items():
        assert [other for other in FORMATS if other.detect(Here(place))] == [form]
        assert format_of(Here(place)) is form


def test_an_empty_folder_is_of_no_format(tmp_path):
    assert not any(form.detect(Here(tmp_path)) for form in FORMATS)
