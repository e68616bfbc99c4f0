"""The functions of the public API, besides their examples (test_readme.py): every kind of address; what is refused."""

import shutil
from pathlib import Path

import pytest
import torch

import olmoscope
from demo_folder import make_demo
from helpers import recipe, write_documents
from olmoscope.errors import UserError
from olmoscope.recipe.load import find_recipe
from reference_checkpoint import checkpoint

RUNS = ("layer_03/width_4096/topk_32_raw_untied", "layer_07/width_4096/topk_32_raw_untied")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("demo"))


def refused(call, *arguments, **settings):
    with pytest.raises(UserError) as caught:
        call(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_and_its_export_are_the_same_coder(demo):
    run, exported = olmoscope.load(demo / "runs" / RUNS[1]), olmoscope.load(str(demo / "release" / RUNS[1]))
    x = torch.randn(3, run.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run.encode(x).values, exported.encode(x).values)
    for coder in (run, exported):
        assert coder.reads == coder.writes == (olmoscope.Site(7),) and coder.dtype == torch.float32
        assert coder.source.bos == "no" and coder.to(dtype=torch.bfloat16).source is coder.source
    assert run.source.name == RUNS[1] and run.source.model_name == "tiny" and run.source.context_size == 512
    assert run.source.model_revision == exported.source.model_revision is not None


def test_an_output_folder_with_one_sae(demo, tmp_path):
    shutil.copytree(demo / "runs" / RUNS[0], tmp_path / "out" / "runs" / RUNS[0])
    assert olmoscope.load(tmp_path / "out").reads == (olmoscope.Site(3),)
    message = refused(olmoscope.load, demo)
    assert "holds 2 SAEs" in message and RUNS[0] in message
    assert "does not exist" in refused(olmoscope.load, tmp_path / "absent")
    assert "layers.3" in refused(olmoscope.load, tmp_path / "out", "layers.7")


@pytest.mark.parametrize("site", ["layers.5", 5, olmoscope.Site(5)])
def test_a_file_that_does_not_say_its_site_is_told(site, tmp_path):
    path = tmp_path / "sae.pt"
    torch.save(checkpoint(layer=None), path)
    assert olmoscope.load(path, site).reads == (olmoscope.Site(5),)
    assert "site" in refused(olmoscope.load, path)
    assert "is not a site" in refused(olmoscope.load, path, "layer 5")


def test_rows_of_a_store_by_any_name_of_their_site(demo):
    store = olmoscope.open_store(str(demo / "store" / "held_out"))
    whole = store.read(olmoscope.Site(7), 0, slice(0, store.segment_rows[0]))
    for site in ("layers.7", 7):
        assert torch.equal(store.read(site, 0, slice(None)), whole)
    assert torch.equal(store.read(7, 0, slice(-5, 10**9)), whole[-5:])
    assert "has no rows of layers.6; it has layers.3, layers.7" in refused(store.read, 6, 0, slice(0, 1))
    assert "has no segment 9; it has 1" in refused(store.read, 7, 9, slice(0, 1))
    assert "have a step" in refused(store.read, 7, 0, slice(0, 8, 2))
    assert "is not a site" in refused(store.read, "layer_07", 0, slice(0, 1))


def test_a_recipe_by_file_name_folder_or_itself(demo, tmp_path):
    by_name, out = find_recipe("tiny", overrides={"tokens.count": 1000, "train.lr": 1e-3})
    assert (by_name.tokens.count, by_name.train.lr, out) == (1000, 1e-3, Path("tiny"))
    assert find_recipe("tiny", overrides=["tokens.count=1000", "train.lr=1e-3"])[0] == by_name
    by_folder, out = find_recipe(demo)
    assert out == demo and find_recipe(demo / "recipe.yaml")[0] == by_folder
    itself = recipe(write_documents(tmp_path / "corpus").parent)
    found, out = find_recipe(itself, tmp_path / "out")
    assert found == itself and found.store_hash() == itself.store_hash() and out == tmp_path / "out"
    assert find_recipe(itself, overrides={"train.batch": 64})[0].train.batch == 64
    assert "train.bath" in refused(find_recipe, itself, overrides={"train.bath": 64})
    assert "a single string" in refused(find_recipe, "tiny", overrides="train.lr=1")
    assert "no recipe.yaml" in refused(find_recipe, tmp_path)
    assert "has no form" in refused(find_recipe, "tiny", form="other")


def test_all_stages_from_a_recipe_object(tmp_path):
    job = recipe(write_documents(tmp_path / "corpus").parent, evaluate={"tokens": 256})
    out = tmp_path / "out"
    made = olmoscope.collect(job, out, worker="0/1")
    assert [one.manifest.split for one in made] == ["train", "held_out"] and made[0].segments_made > 0
    runs = olmoscope.train(job, out, only=[job.saes[0].id])
    assert runs == [out / "runs" / job.saes[0].id] and olmoscope.load(runs[0]).d_sae == 512
    [figures] = olmoscope.evaluate(out, only=[job.saes[0].id])
    assert figures.sae == job.saes[0].id and 0 < figures.fvu < 1.5 and (runs[0] / "report.html").exists()
    [indexed] = olmoscope.index(runs[0], skip_first=1)
    assert indexed.fresh and indexed.folder == runs[0] / "index" and indexed.info.filter.first_positions == 1
    [again] = olmoscope.index(str(runs[0]), skip_first=1)
    assert not again.fresh


def test_mistakes_are_one_line(demo):
    run = demo / "runs" / RUNS[0]
    assert "exclude each other" in refused(olmoscope.train, demo, live=True, store=demo)
    assert "has no SAE 'none'" in refused(olmoscope.train, demo, only=["none"])
    assert "site does nothing here" in refused(olmoscope.evaluate, demo, site=3)
    assert "tokens does nothing here" in refused(olmoscope.evaluate, [demo], tokens=100)
    assert "only is for" in refused(olmoscope.evaluate, run, only=["x"])
    assert "--tokens is for --text" in refused(olmoscope.index, run, tokens=5)
    assert "so it must be over 1" in refused(olmoscope.index, run, max_norm=0.5)
    assert "holds 2 SAEs" in refused(olmoscope.index, demo, out=demo / "index")
    assert "I/N" in refused(olmoscope.collect, demo, worker="2/2")
    assert f"one of its stores, {demo}/store/train or" in refused(olmoscope.open_store, demo)
