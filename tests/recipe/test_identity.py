"""Recipes, stores and runs from before a key existed still have the same hashes."""

from pathlib import Path

from helpers import recipe
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import CoderConfig
from olmoscope.recipe.tree import differences, what_differs

CORPUS = Path("/corpus")


def hashes(job):
    return job.tokens_hash(), job.store_hash(), [job.run_hash(sae) for sae in job.saes]


def test_hashes_of_before_there_were_names_overrides_and_seeds_of_training():
    """Computed by the commit before these keys."""
    assert hashes(recipe(CORPUS, train__adam="exact")) == (
        "84682330d71db1d5", "0ec5aa2e3cb6a316", ["912db8b6ec22bb96", "400f79b747e83078"])
    assert hashes(load_recipe("tiny", overrides=["model.dtype=float32", "train.adam=exact"])) == (
        "ad79c99918f90e9a", "ff06e67c1ed0515e", ["179b9013f23df3fe", "14dad3042a077847"])
    tokens, store, runs = hashes(load_recipe("olmo3-7b-think", "reference", overrides=["model.dtype=bfloat16"]))
    assert (tokens, store, runs[0], runs[-1]) == (
        "7bc7e090ccf7183a", "fa0c594bad76c1f4", "5d69c2901aff1e65", "630dedd6c8879cf0")
    live = recipe(CORPUS, train__adam="exact", train__live={"rows": 1000}, tokens__bos="yes", saes=[
        {"layer": 1, "d_sae": 512, "k": 8, "weights": "untied", "matryoshka": [0.25], "activation": "batchtopk"}])
    assert hashes(live) == ("02145fb508864b93", "0b996bd7fe4ba42e", ["63d86ead58ab4be9"])


def test_names_and_where_a_key_stands_change_no_hash():
    plain = recipe(CORPUS, train__lr=0.002)
    sae = {"layer": 1, "d_sae": 512, "k": 8}
    for entry in (sae | {"train": {"lr": 0.002}}, sae | {"train": {"lr": 2e-3, "seed": 0}, "name": "mine"},
                  sae | {"train": {"lr": 0.002, "checkpoints": "all", "log_every": 7, "together": 1}}):
        job = recipe(CORPUS, saes=[entry])
        assert job.run_hash(job.saes[0]) == plain.run_hash(plain.saes[0])


def test_what_decides_the_weights_changes_the_run_and_not_the_store():
    plain = recipe(CORPUS)
    sae = {"layer": 1, "d_sae": 512, "k": 8}
    others = [recipe(CORPUS, saes=[sae | {"train": train}]) for train in (
        {"seed": 1}, {"lr": 1e-3}, {"batch": 64}, {"filter": {"first_positions": 1}}, {"auxiliary": {"lift": 0.2}})]
    others.append(recipe(CORPUS, train__seed=2))
    assert {job.store_hash() for job in others} == {plain.store_hash()}
    assert len({job.run_hash(job.saes[0]) for job in [plain, *others]}) == 7


def test_the_default_id_knows_no_name():
    sae = CoderConfig(layer=1, d_sae=512, k=8, name="mine", train={"seed": 3})
    assert (sae.id, sae.default_id) == ("mine", "layer_01/width_512/topk_8_raw")


def test_differences_name_keys_and_both_values():
    there = {"train": {"lr": 0.1, "live": None}, "saes": [{"k": 4}], "seed": 0}
    here = {"train": {"lr": 0.2, "live": {"rows": 5}}, "saes": [{"k": 4}, {"k": 8}]}
    assert differences(there, here) == [
        ("train.lr", "0.1", "0.2"), ("train.live", "null", "not given"), ("seed", "0", "not given"),
        ("train.live.rows", "not given", "5"), ("saes.1.k", "not given", "8")]
    assert what_differs(there, here) == (
        "train.lr is 0.1 there, 0.2 here; train.live is null there, not given here; seed is 0 there, not given here "
        "(and train.live.rows, saes.1.k)")
    assert what_differs(here, here) == ""
