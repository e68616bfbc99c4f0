"""The list of formats is complete, and each format knows its own; on the hub the files tell which one it is."""

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest
import torch

import olmoscope.sae.io
from olmoscope.release.export import export_run
from olmoscope.sae.io import reference_trainer, run_checkpoint, run_folder, saelens
from olmoscope.sae.io.formats import FORMATS
from olmoscope.sae.io.open import format_of
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
        assert [other for other in FORMATS if other.detect(place)] == [form]
        assert format_of(place) is form


def test_a_missing_place_is_of_no_format(tmp_path):
    assert not any(form.detect(tmp_path / "absent") or form.detect(tmp_path) for form in FORMATS)


FETCH = """
import json, sys
from olmoscope.errors import UserError
from olmoscope.sae.io.hub import fetch
for formats in ([["absent.json"], ["cfg.json", "sae_weights.safetensors"]], [["absent.json"], ["gone.json"]]):
    try:
        print(json.dumps(sorted(path.name for path in fetch("someone/sae", "", None, formats).iterdir())))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def test_the_first_file_that_is_there_tells_the_format(places, hub_endpoint, tmp_path):
    hub_endpoint.add("model", "someone/sae", places[saelens])
    done = subprocess.run([sys.executable, "-c", FETCH], capture_output=True, text=True, timeout=120,
                          env=hub_endpoint.environment(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    fetched, refused = map(json.loads, done.stdout.splitlines())
    assert fetched == ["cfg.json", "sae_weights.safetensors"]
    assert refused.startswith("cannot have the SAE of hub repository someone/sae: someone/sae has no file absent.json")
