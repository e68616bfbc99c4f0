"""`olmoscope train --store`: training on a store of another output folder, and everything that can go wrong."""

import json
import shutil

import pytest
import yaml

from helpers import checkpoint_contents, recipe, write_documents
from olmoscope.activations.store.inspect import find_stores
from olmoscope.errors import UserError
from olmoscope.features.rows_of import index_sae
from olmoscope.pipeline import collect_stores, evaluate_saes, train_saes, validate_folder
from olmoscope.recipe.load import load_recipe
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.run import run_folder

SAES = [{"layer": 1, "d_sae": 256, "k": 4}]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A recipe and its output folder, collected."""
    folder = tmp_path_factory.mktemp("elsewhere")
    write_documents(folder / "corpus", count=90)
    job = recipe(folder / "corpus", tokens__count=1500, saes=SAES)
    collect_stores(job, folder / "first")
    return job, folder / "first"


def other(job, **changes):
    """The same recipe with other SAEs and other changes."""
    tree = yaml.safe_load(job.to_yaml())
    for path, value in {"saes": [SAES[0] | {"name": "mine", "train": {"seed": 3}}], **changes}.items():
        *parents, last = path.split("__")
        node = tree
        for key in parents:
            node = node[key]
        node[last] = value
    return type(job).model_validate(tree)


def refused(job, out, store, message):
    with pytest.raises(UserError, match=message) as raised:
        list(train_saes(job, out, [], elsewhere=store))
    assert "\n" not in str(raised.value)
    assert not (out / "store.json").exists() and not (out / "runs").exists()


@pytest.mark.parametrize("which", ["", "store", "store/train"])
def test_train_evaluate_and_index_without_a_store_of_its_own(first, tmp_path, which):
    job, folder = first
    mine, out = other(job), tmp_path / "second"
    place = tmp_path / "first"
    shutil.copytree(folder, place)
    if which == "store":
        refused(mine, out, place / which, "there is no training store")
        return
    assert [fresh for _, fresh in train_saes(mine, out, [], elsewhere=place / which)] == [True]
    assert json.loads((out / "store.json").read_text()) == {
        "train": "../first/store/train", "held_out": "../first/store/held_out"}
    assert not (out / "store").exists() and [path.name for path in find_stores(out)] == ["train", "held_out"]
    assert [fresh for _, fresh in train_saes(mine, out, [])] == [False]
    list(train_saes(mine, place, []))
    theirs, ours = (checkpoint_contents(checkpoints(run_folder(where, mine.saes[0]))[-1]) for where in (place, out))
    assert theirs == ours
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (place, out):
        path.rename(moved / path.name)
    out = moved / "second"
    again = load_recipe(str(out / "recipe.yaml"))
    assert [fresh for _, fresh in evaluate_saes(again, out, [])] == [True]
    assert index_sae(str(run_folder(out, mine.saes[0])), device="cpu").info.store["split"] == "train"
    shutil.rmtree(moved / "first")
    for use in (lambda: list(evaluate_saes(again, out, [])), lambda: list(train_saes(again, out, [])),
                lambda: index_sae(str(run_folder(out, mine.saes[0])), out=tmp_path / "index", device="cpu")):
        with pytest.raises(UserError, match=r"was trained on the store .*first/store/.* which is gone.*--store PATH"):
            use()
    shutil.copytree(folder, tmp_path / "back")
    assert [fresh for _, fresh in train_saes(again, out, [], elsewhere=tmp_path / "back")] == [False]
    assert [fresh for _, fresh in evaluate_saes(again, out, [])] == [False]


def test_a_store_without_held_out_rows(first, tmp_path):
    job, folder = first
    mine, out = other(job), tmp_path / "out"
    shutil.copytree(folder / "store" / "train", tmp_path / "alone")
    list(train_saes(mine, out, [], elsewhere=tmp_path / "alone"))
    with pytest.raises(UserError, match=r"has no held_out store beside it.*--text TEXT"):
        list(evaluate_saes(mine, out, []))
    with pytest.raises(UserError, match="neither a release"):
        validate_folder(tmp_path)


def test_what_differs_is_named_with_both_values(first, tmp_path):
    job, folder = first
    out = tmp_path / "out"
    refused(other(job, tokens__count=1501), out, folder,
            r"collected with another recipe: tokens.count is 1500 there, 1501 here; set tokens.count=1500, or run `olm")
    refused(other(job, seed=9), out, folder, r"seed is 0 there, 9 here")
    refused(other(job, text__mixture={"web": 2.0}), out, folder, r"text.mixture.web is 1.0 there, 2.0 here")
    refused(other(job, model__revision="abc"), out, folder, r'model.revision is null there, "abc" here')
    refused(other(job, model__name="another/model", tokens__bos="no"), out, folder, r"the recipe is for another/model")
    lacks = other(job, activations__sites=[1, 3, 7], saes=[SAES[0] | {"layer": 3}])
    refused(lacks, out, folder, r"has no rows of layers\.3 \(it has layers\.1, layers\.7\); run `olmoscope coll")
    shutil.copytree(folder / "store" / "train", tmp_path / "alone")  # nothing beside it says which recipe it belongs to
    refused(other(job, seed=9), out, tmp_path / "alone", r"another recipe \(hash \w+, this one's is \w+\): its text")
    with pytest.raises(UserError, match=r"holds the store of another recipe: tokens.count is 1500 there, 7 here"):
        collect_stores(other(job, tokens__count=7), folder)
    assert load_recipe(str(folder / "recipe.yaml")).tokens.count == 1500


def test_places_that_are_no_training_store(first, tmp_path):
    job, folder = first
    mine, out = other(job), tmp_path / "out"
    refused(mine, out, folder / "store" / "held_out", "this is the held_out store; give the training store")
    refused(mine, out, tmp_path, "there is no training store")
    refused(mine, out, tmp_path / "nothing", "there is no training store")
    with pytest.raises(UserError, match="has its own training store; leave out --store"):
        list(train_saes(job, folder, [], elsewhere=folder))
    refused(other(job, train__live={"rows": 500}), out, folder, r"mine trains straight from the model \(train.live\)")
    list(train_saes(mine, out, [], elsewhere=folder))
    with pytest.raises(UserError, match=r"was trained on the store .*first/store/train; collect there"):
        collect_stores(mine, out)
    (out / "store.json").write_text("[]")
    with pytest.raises(UserError, match=r"store.json is damaged; delete it and say where the store is"):
        list(train_saes(mine, out, []))


def test_another_run_of_the_name_is_refused_with_what_differs(first, tmp_path):
    job, folder = first
    out = tmp_path / "out"
    list(train_saes(other(job), out, [], elsewhere=folder))
    for sae, message in (
            (SAES[0] | {"train": {"seed": 4}}, r"holds a different run of mine: train.seed is 3 there, 4 here; choose"),
            (SAES[0] | {"k": 5, "train": {"seed": 3}}, r"sae.k is 4 there, 5 here"),
            (SAES[0] | {"train": {"seed": 3, "auxiliary": {"lift": 1}}}, r"auxiliary.lift is 0.1 there, 1.0 here")):
        with pytest.raises(UserError, match=message):
            list(train_saes(other(job, saes=[sae | {"name": "mine"}]), out, []))
