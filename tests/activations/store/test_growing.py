"""A store grows: collecting more sites or tokens keeps the finished segments and gives the same store as collecting
everything at once."""

import json
import shutil

import pytest
import torch

from helpers import checkpoint_contents, recipe, write_documents
from olmoscope.activations.store.format import read_manifest
from olmoscope.activations.store.inspect import find_stores
from olmoscope.activations.store.reader import open_store
from olmoscope.activations.store.shares import Worker
from olmoscope.activations.store.statistics import read_mean
from olmoscope.activations.store.verify import verify_stores
from olmoscope.errors import UserError
from olmoscope.files import sha256
from olmoscope.pipeline import collect_stores, evaluate_saes, store_folder, train_saes
from olmoscope.site import Site

COUNT = 2000
RUN = {"layer": 1, "d_sae": 512, "k": 8}
LATER = {"site": "layers.7.mlp.out", "d_sae": 512, "k": 8}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus"), count=150).parent


@pytest.fixture(scope="module")
def begun(corpus, tmp_path_factory):
    """An output folder of one site; tests copy it."""
    out = tmp_path_factory.mktemp("begun") / "out"
    job = make(corpus, ["layers.1"])
    collect_stores(job, out)
    list(train_saes(job, out, []))
    list(evaluate_saes(job, out, []))
    return out


@pytest.fixture
def out(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "out")


def make(corpus, sites, **changes):
    settings = {"tokens__count": COUNT, "tokens__held_out": 900, "saes": [RUN], "evaluate": {"tokens": 200}}
    return recipe(corpus, activations={"sites": sites}, **settings | changes)


def files(folder, but=()):
    """Every file except locks, with the time of its last change."""
    return {str(path.relative_to(folder)): (sha256(path), path.stat().st_mtime_ns)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".lock") and path.name not in but}


def contents(folder, but=()):
    return {name: digest for name, (digest, _) in files(folder, but).items()}


def test_sites_are_added_and_nothing_is_made_again(corpus, out, tmp_path):
    before = files(out / "store"), files(out / "runs")
    wanted = make(corpus, ["layers.1", "layers.7.mlp.out", "layers.7"], saes=[RUN, LATER])
    collected = collect_stores(wanted, out)
    assert [(one.store.name, one.segments_made > 0) for one in collected] == [
        ("train", False), ("train-2", True), ("held_out", False), ("held_out-2", True)]
    assert {name: value for name, value in files(out / "store").items() if "-2/" not in name} == before[0]
    at_once = tmp_path / "at once"
    collect_stores(wanted, at_once)
    for split in ("train", "held_out"):
        grown, whole = open_store(store_folder(out, split)), open_store(store_folder(at_once, split))
        assert grown.manifest.sites == whole.manifest.sites == wanted.activations.sites
        assert (grown.manifest.widths, grown.manifest.modules) == (whole.manifest.widths, whole.manifest.modules)
        for segment, rows in enumerate(whole.segment_rows):
            facts = grown.read_rows(segment), whole.read_rows(segment)
            assert facts[0].keys() == facts[1].keys()
            assert all(torch.equal(facts[0][name], facts[1][name]) for name in facts[1])
            for site in whole.manifest.sites:
                part = slice(0, rows)
                assert torch.equal(grown.read(site, segment, part), whole.read(site, segment, part))
        for site in whole.manifest.sites:
            assert grown.median_norm(site) == whole.median_norm(site)
            assert torch.equal(read_mean(grown.folder_of(site), site), read_mean(whole.folder_of(site), site))
    assert all(not one.problems for one in verify_stores(out))
    assert [store.name for store in find_stores(out)] == ["train", "train-2", "held_out", "held_out-2"]

    runs = [(sae.id, fresh) for sae, fresh in train_saes(wanted, out, [])]
    assert [fresh for _, fresh in runs] == [False, True]
    assert [fresh for _, fresh in evaluate_saes(wanted, out, [])] == [False, True]
    kept = files(out / "runs")
    assert {name: kept[name] for name in before[1]} == before[1]
    list(train_saes(wanted, at_once, []))
    for run, _ in runs:
        assert weights(out / "runs" / run) == weights(at_once / "runs" / run)
    assert [one.segments_made for one in collect_stores(wanted, out)] == [0, 0, 0, 0]
    fewer = make(corpus, ["layers.1"])  # the earlier recipe: nothing to do, and no error
    assert [one.segments_made for one in collect_stores(fewer, out)] == [0, 0, 0, 0]


def weights(run):
    return checkpoint_contents(next((run / "checkpoints").iterdir()))["tensors"]


@pytest.mark.parametrize("old", [False, True])
def test_held_out_tokens_are_added(corpus, out, tmp_path, old):
    """This also works for a store from before `wanted` was recorded."""
    if old:
        for split in ("train", "held_out"):
            edit(out / "store" / split / "manifest.json", lambda tree: tree.pop("wanted"))
            edit(out / "store" / split / "tokens" / "recipe.json", lambda tree: tree.pop("wanted"))
        collect_stores(make(corpus, ["layers.1"]), out)  # the next collection of any kind records it
    train, held_out = (files(out / "store" / split, {"manifest.json"}) for split in ("train", "held_out"))
    more = make(corpus, ["layers.1"], tokens__held_out=2500)
    made = collect_stores(more, out)
    assert made[0].segments_made == 0 and files(out / "store" / "train", {"manifest.json"}) == train
    collect_stores(more, tmp_path / "at once")
    grown = files(out / "store" / "held_out", {"manifest.json"})
    assert contents(out / "store" / "held_out", {"manifest.json"}) == contents(
        tmp_path / "at once" / "store" / "held_out", {"manifest.json"})
    last = max(int(name[-18:-12]) for name in held_out if name.startswith("rows/"))
    whole = [name for name in held_out if name.endswith(".safetensors") and "segment-" in name
             and int(name[-18:-12]) < last]
    assert whole and {name: grown[name] for name in whole} == {name: held_out[name] for name in whole}
    manifest, at_once = (read_manifest(folder / "store" / "held_out") for folder in (out, tmp_path / "at once"))
    assert manifest == at_once
    assert all(not one.problems for one in verify_stores(out))
    # The run is unchanged, but its evaluation now uses other rows.
    assert [fresh for _, fresh in train_saes(more, out, [])] == [False]
    assert [fresh for _, fresh in evaluate_saes(more, out, [])] == [True]
    assert [one.segments_made for one in collect_stores(more, out)] == [0, 0]


def edit(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_training_tokens_are_added_and_the_run_of_before_is_told_apart(corpus, out, tmp_path):
    more = make(corpus, ["layers.1"], tokens__count=3300)
    with pytest.raises(UserError, match=r"holds a different run .* tokens.count is 2000 there, 3300 here"):
        list(train_saes(more, out, []))
    other = make(corpus, ["layers.1"], tokens__count=3300, saes=[RUN | {"name": "longer"}])
    with pytest.raises(UserError, match=r"tokens.count is 2000 there, 3300 here; set tokens.count=2000, or run "
                                        "`olmoscope collect` with this recipe, which adds what is missing"):
        list(train_saes(other, out, []))
    collect_stores(other, out)
    collect_stores(other, tmp_path / "at once")
    assert contents(out / "store" / "train") == contents(tmp_path / "at once" / "store" / "train")
    assert [fresh for _, fresh in train_saes(other, out, [])] == [True]
    with pytest.raises(UserError, match=r"tokens.count is 3300 there, 2000 here; a store can grow, not shrink"):
        collect_stores(make(corpus, ["layers.1"]), out)


def test_all_parts_grow(corpus, out, tmp_path):
    two = make(corpus, ["layers.1", "layers.7"])
    collect_stores(two, out)
    more = make(corpus, ["layers.1", "layers.7.mid", "layers.7"], tokens__count=3300, tokens__held_out=2500)
    assert [one.store.name for one in collect_stores(more, out)] == [
        "train", "train-2", "train-3", "held_out", "held_out-2", "held_out-3"]
    collect_stores(more, tmp_path / "at once")
    for split in ("train", "held_out"):
        grown, whole = (open_store(store_folder(folder, split)) for folder in (out, tmp_path / "at once"))
        assert len(grown.parts) == 3 and grown.segment_rows == whole.segment_rows
        for site in whole.manifest.sites:
            for segment, rows in enumerate(whole.segment_rows):
                part = slice(0, rows)
                assert torch.equal(grown.read(site, segment, part), whole.read(site, segment, part))
    assert all(not one.problems for one in verify_stores(out))


def test_workers_share_what_is_added(corpus, out):
    wanted = make(corpus, ["layers.1", "layers.7"], tokens__count=3300)
    for index in range(2):
        collect_stores(wanted, out, Worker(index, 2))
    assert [one.segments_made for one in collect_stores(wanted, out)] == [0, 0, 0, 0]
    assert open_store(store_folder(out, "train")).manifest.sites == [Site(1), Site(7)]


def test_a_part_that_is_not_finished_is_none_yet(corpus, out):
    wanted = make(corpus, ["layers.1", "layers.7"], saes=[RUN | {"name": "new"}, {"layer": 7, "d_sae": 512, "k": 8}])
    collect_stores(wanted, out)
    edit(out / "store" / "train-2" / "manifest.json", lambda tree: tree.update(finished=False))
    store = open_store(out / "store" / "train")
    assert store.manifest.sites == [Site(1)]
    assert [fresh for _, fresh in train_saes(wanted, out, ["new"])] == [True]
    with pytest.raises(UserError, match=r"has no rows of layers\.7 \(it has layers\.1\); run `olmoscope collect` with "
                                        "this recipe: it adds what is missing"):
        list(train_saes(wanted, out, []))


@pytest.mark.parametrize(("change", "what"), [
    (lambda tree: tree["model"].update(revision="sha256:0"), "model"),
    (lambda tree: tree.update(dtype="float32"), "dtype"),
    (lambda tree: tree.update(tokenizer_hash="0"), "tokenizer")])
def test_a_part_of_something_else_is_refused(corpus, out, change, what):
    collect_stores(make(corpus, ["layers.1", "layers.7"]), out)
    edit(out / "store" / "train-2" / "manifest.json", change)
    with pytest.raises(UserError, match=f"train-2 is not a part of .*: its {what} differs") as caught:
        open_store(out / "store" / "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"seed": 7}, "seed is 0 there, 7 here"), ({"activations__dtype": "float32"}, "activations.dtype is"),
    ({"tokens__segment_rows": 600}, "tokens.segment_rows is 700 there, 600 here"),
    ({"tokens__held_out": 100}, "tokens.held_out is 900 there, 100 here; a store can grow, not shrink")])
def test_what_cannot_be_added_is_refused_before_anything_starts(corpus, out, changes, message):
    before = files(out)
    wanted = make(corpus, ["layers.1", "layers.7"])
    for path, value in changes.items():
        part, _, key = path.partition("__")
        update = {key: value} if key else value
        wanted = wanted.model_copy(update={part: getattr(wanted, part).model_copy(update=update) if key else value})
    with pytest.raises(UserError, match=message) as caught:
        collect_stores(wanted, out)
    assert "\n" not in str(caught.value) and files(out) == before


def test_a_text_that_runs_out_while_a_store_grows(corpus, out):
    """There are no more tokens to add, and the store is as good as any other."""
    more = make(corpus, ["layers.1"], tokens__count=1_000_000, saes=[RUN | {"name": "longer"}])
    made = collect_stores(more, out)[0]
    assert COUNT < made.manifest.rows < 1_000_000
    again = make(corpus, ["layers.1"], tokens__count=2_000_000, saes=[RUN | {"name": "longer"}])
    assert collect_stores(again, out)[0].manifest.rows == made.manifest.rows
    assert [fresh for _, fresh in train_saes(again, out, [])] == [True]
    assert all(not one.problems for one in verify_stores(out))
