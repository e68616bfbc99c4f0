"""Stores of format version 1, which named residual streams by their layers, are read like current ones."""

import json

import pytest

from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.activations.store.statistics import read_statistics
from olmoscope.activations.store.verify import verify_stores
from olmoscope.site import Site


@pytest.fixture
def store(tmp_path):
    """A store whose manifest and statistics are those that version 1 wrote."""
    write_documents(tmp_path / "corpus")
    job = recipe(tmp_path / "corpus")
    path = collect(job, "train", tmp_path / "store").store
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sites"], manifest["widths"]
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": 1, "layers": [1, 7]}))
    figures = json.loads((path / "statistics.json").read_text())
    figures["layers"] = {site.removeprefix("layers."): values for site, values in figures.pop("sites").items()}
    (path / "statistics.json").write_text(json.dumps(figures))
    return job, path


def test_it_opens_and_its_files_are_sound(store):
    job, path = store
    opened = open_store(path)
    assert (opened.manifest.sites, opened.manifest.widths) == ([Site(1), Site(7)], [256, 256])
    assert opened.manifest.recipe_hash == job.store_hash()
    assert opened.read(Site(7), 0, slice(0, 5)).shape == (5, 256)
    assert list(read_statistics(path)["sites"]) == ["layers.1", "layers.7"]
    assert [problem for one in verify_stores(path) for problem in one.problems] == []


def test_collecting_again_finds_everything_there(store):
    job, path = store
    again = collect(job, "train", path)
    assert (again.segments_made, again.segments_missing) == (0, 0)
    assert json.loads((path / "manifest.json").read_text())["version"] == 1
