"""BOS at the start of sequences: every command treats it the same, and a release states it correctly."""

import json
import shutil

import numpy as np
import pytest
import yaml

from helpers import put_bos_first, recipe, save_small_model, write_documents
from olmoscope.activations.store.format import read_manifest
from olmoscope.activations.stream.live import open_live
from olmoscope.browse.collection import open_collection
from olmoscope.errors import UserError
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.evaluate.sequences import read_sequences
from olmoscope.features.read import FeatureIndex
from olmoscope.features.rows_of import index_sae
from olmoscope.pipeline import collect_stores, evaluate_saes, settle_recipe, train_saes
from olmoscope.recipe.load import load_recipe
from olmoscope.release.build import build_release
from olmoscope.release.export import export_run
from olmoscope.sae.io.open import open_sae
from olmoscope.tokens.segments import read_token_segment
from olmoscope.tokens.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_small_model("Llama", tmp_path_factory.mktemp("bos") / "model")
    return folder, put_bos_first(folder)


def job(corpus, model, **changes):
    return recipe(corpus, model__name=str(model), activations__layers=[1], activations__dtype="float32",
                  saes=[{"layer": 1, "d_sae": 64, "k": 4}], evaluate={"tokens": 400}, **changes)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """An output folder of a model whose tokenizer puts BOS first, and the recipe, which does not mention BOS."""
    folder = tmp_path_factory.mktemp("made")
    made = job(write_documents(folder / "corpus").parent, model[0])
    collect_stores(made, folder / "out")
    list(train_saes(made, folder / "out", []))
    list(evaluate_saes(made, folder / "out", []))
    return made, folder / "out"


def firsts(store):
    for segment in range(read_manifest(store).segments):
        tokens = read_token_segment(store, segment)
        yield from tokens.token_ids[tokens.sequence_starts[:-1]].tolist()


def test_a_recipe_that_says_nothing_does_as_the_tokenizer(made, model):
    recipe, out = made
    for split in ("train", "held_out"):
        store = out / "store" / split
        assert set(firsts(store)) == {model[1]}
        assert read_manifest(store).bos_token_ids == [model[1]]
        assert model[1] in read_manifest(store).special_token_ids
    assert yaml.safe_load((out / "recipe.yaml").read_text())["tokens"]["bos"] == "yes"
    assert settle_recipe(recipe, out).store_hash() == read_manifest(out / "store" / "train").recipe_hash
    assert [fresh for _, fresh in evaluate_saes(recipe, out, [])] == [False]


@pytest.mark.parametrize("bos", ["yes", "no", True, False])
def test_a_recipe_decides(made, model, tmp_path, bos):
    recipe, out = made
    decided = job(out.parent / "corpus", model[0], tokens__bos=bos)
    assert load_recipe(str(_written(decided, tmp_path))).tokens.bos == decided.tokens.bos
    if decided.tokens.bos == "no":
        with pytest.raises(UserError, match="holds the store of another recipe"):
            collect_stores(decided, out)
        collect_stores(decided, tmp_path / "out")
        assert model[1] not in set(firsts(tmp_path / "out" / "store" / "train"))
        # A store from before the setting existed has no BOS: a recipe that does not mention BOS continues it.
        assert settle_recipe(recipe, tmp_path / "out").tokens.bos == "no"
        assert [one.segments_made for one in collect_stores(recipe, tmp_path / "out")] == [0, 0]
    else:
        assert [one.segments_made for one in collect_stores(decided, out)] == [0, 0]


def _written(recipe, folder):
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return folder / "recipe.yaml"


def test_yes_needs_a_bos(tmp_path):
    tiny = recipe(write_documents(tmp_path / "corpus").parent, tokens__bos="yes")
    with pytest.raises(UserError, match="the tokenizer of 'tiny' has no BOS token"):
        collect_stores(tiny, tmp_path / "out")


def test_documents_apart_begin_with_it_each(model, tmp_path):
    apart = job(write_documents(tmp_path / "corpus").parent, model[0], tokens__documents="apart", tokens__bos="yes")
    collect_stores(apart, tmp_path / "out")
    store = tmp_path / "out" / "store" / "train"
    for segment in range(read_manifest(store).segments):
        tokens = read_token_segment(store, segment)
        for start, end in zip(tokens.sequence_starts[:-1], tokens.sequence_starts[1:], strict=True):
            documents = tokens.document_ids[start:end]
            begins = np.flatnonzero(np.diff(documents, prepend=-1))
            assert (tokens.token_ids[start:end][begins] == model[1]).all()
            assert (tokens.token_ids[start:end] == model[1]).sum() == len(begins)


def test_live_training_reads_the_same_tokens(made, tmp_path):
    recipe, out = made
    settled = settle_recipe(recipe, out)
    rounds = open_live(settled, [1], "train", tmp_path / "store")
    first = [read_token_segment(store, 0).token_ids for store in (tmp_path / "store", out / "store" / "train")]
    assert np.array_equal(*first) and rounds.manifest.bos_token_ids


def test_what_is_released_says_so(made, model, tmp_path):
    recipe, out = made
    run = out / "runs" / recipe.saes[0].id
    assert open_sae(run).bos == "yes"
    config = json.loads((export_run(run).folder / "cfg.json").read_text())
    assert config["metadata"]["prepend_bos"] is True and config["metadata"]["context_size"] == 128
    assert open_sae(run / "sae").bos == "yes"
    card = (build_release(out).folder / "README.md").read_text()
    assert "BOS at the start of each sequence" in card and "tokenizer(tokenizer.bos_token + " in card


def test_evaluate_reads_a_held_out_text_with_and_without(made, model, tmp_path):
    """A stored BOS is not added twice, and is removed for an SAE that was trained without BOS."""
    recipe, out = made
    run, store = out / "runs" / recipe.saes[0].id, out / "store" / "held_out"
    for bos in ("yes", "no"):
        tokenizer = load_tokenizer(recipe.model, bos)
        read = read_sequences(store, tokenizer, apart=False, stored=(model[1],))
        assert set(read.token_ids[read.starts[:-1]] == model[1]) == {bos == "yes"}
        assert (read.token_ids == model[1]).sum() == (len(read.starts) - 1) * (bos == "yes")
        assert read.special[read.starts[:-1]].all() == (bos == "yes")
    [one] = evaluate_anywhere([str(run)], Options(tmp_path / "with"))
    evaluation = read_evaluation(one.folder / EVALUATION)
    assert evaluation.text.tokens_hash == read_evaluation(run / EVALUATION).text.tokens_hash
    folder = tmp_path / "sae"
    shutil.copytree(export_run(run).folder, folder)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["prepend_bos"] = None  # an option does not overrule what an SAE states
    (folder / "cfg.json").write_text(json.dumps(config))
    [one] = evaluate_anywhere([str(folder)], Options(tmp_path / "without", str(out), bos=False))
    assert read_evaluation(one.folder / EVALUATION).rows == evaluation.rows - len(list(firsts(store)))


@pytest.mark.parametrize(("prepend_bos", "wanted"), [(True, True), (False, False), (None, True)])
def test_an_sae_is_obeyed_by_evaluate_and_index(made, model, tmp_path, prepend_bos, wanted):
    """If a folder does not say, the tokenizer decides."""
    recipe, out = made
    folder = tmp_path / "sae"
    shutil.copytree(export_run(out / "runs" / recipe.saes[0].id).folder, folder)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["prepend_bos"] = prepend_bos
    (folder / "cfg.json").write_text(json.dumps(config))
    text = tmp_path / "text.txt"
    text.write_text("A text that is read now. " * 60)
    indexed = index_sae(str(folder), text=str(text), out=tmp_path / "index", tokens=300, device="cpu")
    corpus = FeatureIndex(indexed.folder).corpus
    assert ((np.array(corpus.tokens_T)[corpus.sequences_S1[:-1]] == model[1]) == wanted).all()
    assert corpus.sequences_S1[1] == 128  # BOS counts in the length of the sequences that the SAE was trained on
    [one] = evaluate_anywhere([str(folder)], Options(tmp_path / "out", str(text), tokens=300))
    tokens = next((tmp_path / "out" / "text").rglob("segment-000000.safetensors")).parents[1]
    assert {token == model[1] for token in (read_token_segment(tokens, 0).token_ids[[0]])} == {wanted}
    assert read_evaluation(one.folder / EVALUATION).rows == indexed.info.rows
    [shown] = open_collection(indexed.folder, None).values()
    assert (shown.live.tokens("A prompt", begin=shown.begin)[0] == model[1]) == wanted
    if prepend_bos is None:
        other = index_sae(str(folder), text=str(text), out=tmp_path / "other", tokens=300, bos=False, device="cpu")
        assert not other.info.store.get("bos_token_ids")
    moved = tmp_path / "elsewhere" / "moved.txt"
    moved.parent.mkdir()
    text.rename(moved)
    assert not index_sae(str(folder), text=str(moved), out=tmp_path / "index", tokens=300, device="cpu").fresh
    [again] = evaluate_anywhere([str(folder)], Options(tmp_path / "out", str(moved), tokens=300))
    assert not again.fresh
    moved.write_text("Another text that is read now. " * 60)
    with pytest.raises(UserError, match="holds another index"):
        index_sae(str(folder), text=str(moved), out=tmp_path / "index", tokens=300, device="cpu")
    [again] = evaluate_anywhere([str(folder)], Options(tmp_path / "out", str(moved), tokens=300))
    assert again.fresh
