"""Runs in shards: any number of ranks gives the same folder and can resume it, and it is read like any run."""

import json
import re
import shutil

import pytest
import torch

from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.errors import UserError
from olmoscope.files import read_json, write_json
from olmoscope.recipe.schema import Candidates, Recipe
from olmoscope.recipe.training import Finish
from olmoscope.sae.io.checkpoint import read_alive, read_checkpoint
from olmoscope.sae.io.checkpoint_file import opened_checkpoint
from olmoscope.sae.io.open import find_saes, load, look_at
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.train.candidate_trial import Verdict
from olmoscope.train.candidates import EXACT
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.group import train_from_store
from olmoscope.train.run import run_folder
from olmoscope.train.teams import share_out
from shard_jobs import contents, train_recipe

SAES = [{"layer": 1, "d_sae": 301, "k": 8, "weights": "untied"},
        {"layer": 1, "d_sae": 130, "k": 40, "normalize": "layer_norm"}]
"""Uneven shards; the second SAE's k is larger than a shard."""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=120)
    job = recipe(folder / "corpus", saes=SAES, tokens__count=6000, activations={"layers": [1, 7]}, train__shards=4,
                 train__epochs=2, train__dead_window=500, train__batch=300, train__checkpoint_every=10)
    collect(job, "train", folder / "store")
    return job, folder / "store"


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """Trained by one process, never stopped."""
    job, store = job
    out = tmp_path_factory.mktemp("whole")
    assert [sae.id for sae, _ in train_from_store(job, job.saes, open_store(store), out)] == [
        sae.id for sae in job.saes]
    return out


def same_runs(job: Recipe, one, other) -> bool:
    return all(contents(run_folder(one, sae)) == contents(run_folder(other, sae)) for sae in job.saes)


def test_several_ranks_write_the_same_run(rank_pool, job, whole, tmp_path):
    job, store = job
    found = rank_pool.run(4, train_recipe, job, store, tmp_path)
    assert found == [[sae.id for sae in job.saes], [], [], []], "the first rank tells"
    assert same_runs(job, whole, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_stopped_on_four_it_goes_on_with_two_one_and_four(rank_pool, job, whole, tmp_path):
    job, store = job
    for count, steps, told in ((4, 8, "last"), (2, 16, "all"), (1, 24, "all"), (4, None, "")):
        found = rank_pool.run(count, train_recipe, job, store, tmp_path, steps, told)
        if steps:
            assert found == ["stopped"] * count
            assert [path.name for path in checkpoints(run_folder(tmp_path, job.saes[0]))] == [f"step-{steps:08d}"]
    assert same_runs(job, whole, tmp_path)


def test_a_segment_that_one_rank_finds_damaged_stops_all_at_the_same_step(rank_pool, job, whole, tmp_path):
    job, store = job
    shutil.copytree(store, tmp_path / "copy")
    found = rank_pool.run(4, train_recipe, job, store, tmp_path, None, "last", (3, tmp_path / "copy"))  # rank 3 has it
    said = found.pop(3)
    assert found == ["another rank failed"] * 3
    assert re.search(r"segment-000003\.safetensors is damaged .*; run `olmoscope store repair", said), said
    assert [path.name for path in checkpoints(run_folder(tmp_path, job.saes[0]))] == ["step-00000020"]
    rank_pool.run(2, train_recipe, job, store, tmp_path)
    assert same_runs(job, whole, tmp_path)


def test_it_is_read_as_any_run(job, whole):
    job, _ = job
    for spec in job.saes:
        run = run_folder(whole, spec)
        sae = load(run)
        assert (sae.d_sae, sae.k, sae.tied, sae.normalize) == (spec.d_sae, spec.k, spec.weights == "tied",
                                                               spec.normalize)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(spec.d_sae))
        last = checkpoints(run)[-1]
        assert last.name == "step-00000040" and load(last).source.name == f"{spec.id}@40"
        assert find_saes(str(run / "checkpoints")) == [str(last)]
        reading = look_at(last)[1]
        assert reading.d_sae == spec.d_sae and len([name for name in reading.files if "shard-" in name]) == 4
        assert read_alive(last, 500).sum() > 0 and len(read_alive(last, 500)) == spec.d_sae
        assert len(load(run).W_enc.unique(dim=0)) == spec.d_sae, "each shard begins with rows of its own"


def test_so_are_other_kinds_stopped_alone_and_finished_by_two(rank_pool, job, tmp_path):
    _, store = job
    saes = [{"layer": 1, "k": 9, "activation": "batchtopk", "matryoshka": [0.1, 0.6]},
            {"layer": 1, "k": 7, "activation": "jumprelu", "weights": "untied", "train": {"orthogonal": 0.8}},
            {"reads": 1, "writes": 7, "k": 8, "weights": "untied", "skip": True}, {"reads": [1, 7], "k": 8}]
    kinds = recipe(tmp_path, saes=[{"d_sae": 131} | sae for sae in saes])
    job = job[0].model_copy(update={"saes": kinds.saes, "train": job[0].train.model_copy(update={"epochs": 1})})
    list(train_from_store(job, job.saes, open_store(store), tmp_path / "one"))
    assert rank_pool.run(1, train_recipe, job, store, tmp_path / "two", 8) == ["stopped"]
    assert len(rank_pool.run(2, train_recipe, job, store, tmp_path / "two")[0]) == len(saes)
    assert same_runs(job, tmp_path / "one", tmp_path / "two")
    found = [load(run_folder(tmp_path / "one", sae)) for sae in job.saes]
    assert [type(sae) for sae in found] == [JumpReLU, JumpReLU, TopK, TopK]
    assert all(len(sae.W_enc.unique(dim=0)) == 131 for sae in found) and found[2].transcoder


def test_candidates_have_a_margin_for_each_shard(rank_pool, job, tmp_path):
    job, store = job
    train = job.train.model_copy(update={"epochs": 4, "candidates": Candidates(margin=0)})
    job = job.model_copy(update={"saes": job.saes[:1], "train": train})
    runs = [run_folder(tmp_path / name, job.saes[0]) for name in ("one", "four")]
    for run in runs:
        run.mkdir(parents=True)
        write_json(run / "candidates.json", {"exact_ms": 2.0, "candidates_ms": 1.0})  # the clock would decide otherwise
    list(train_from_store(job, job.saes, open_store(store), tmp_path / "one"))
    for count, steps in ((4, 16), (2, 72), (4, None)):
        rank_pool.run(count, train_recipe, job, store, tmp_path / "four", steps)
    assert contents(runs[0]) == contents(runs[1])
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    found = [line["candidates_found"] for line in lines if line["candidates_found"] is not None]
    assert lines[-1]["margin"] >= 8 and 0.9 < min(found) < 1
    logs = [(run / "training.log").read_text() for run in runs]
    warned = re.findall(r"warning: at step 64 .*; from here on, k \+ 8 candidates are used in shards \d.*", logs[0])
    assert len(warned) == 1 and warned[0] in logs[1]
    with opened_checkpoint(checkpoints(runs[1])[-1]) as (_, file):
        margins = file.get_tensor("candidates.margin").tolist()
        assert len(margins) == 4 and max(margins) == lines[-1]["margin"]
        assert len(file.get_tensor("candidates.counts")) == 16


def test_the_ranks_agree_on_the_verdict_of_the_clock(rank_pool, job, tmp_path):
    job, store = job
    train = job.train.model_copy(update={"epochs": 1, "candidates": Candidates()})
    job = job.model_copy(update={"saes": job.saes[:1], "train": train})
    rank_pool.run(2, train_recipe, job, store, tmp_path)
    run = run_folder(tmp_path, job.saes[0])
    verdict = Verdict(**read_json(run / "candidates.json"))
    assert 0 < verdict.exact_ms < 1e4 and 0 < verdict.candidates_ms < 1e4
    assert (run / "training.log").read_text().count(str(verdict)) == 1
    margin = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["margin"]
    assert margin == (16 if verdict.candidates_win else EXACT)


def test_ranks_share_the_sequences_of_a_finish(rank_pool, job, tmp_path):
    job, store = job
    kinds = recipe(tmp_path, saes=[{"layer": 7, "d_sae": 131, "k": 8, "matryoshka": [0.3]},
                                   {"reads": 1, "writes": 7, "d_sae": 130, "k": 8, "weights": "untied", "skip": True}])
    train = job.train.model_copy(update={"epochs": 1, "finish": Finish(share=0.5)})
    job = job.model_copy(update={"saes": kinds.saes, "train": train})
    list(train_from_store(job, job.saes, open_store(store), tmp_path / "one"))
    for count, steps in ((4, 8), (2, 16), (4, None)):
        rank_pool.run(count, train_recipe, job, store, tmp_path / "four", steps)
    assert same_runs(job, tmp_path / "one", tmp_path / "four")
    done = contents(run_folder(tmp_path / "one", job.saes[0]))["done"]
    assert done["steps"] == 20 and done["tokens"] > 1.4 * 6000


@pytest.fixture
def stopped(rank_pool, job, tmp_path):
    """Runs of two checkpoints each."""
    job, store = job
    job = job.model_copy(update={"train": job.train.model_copy(update={"checkpoints": "all"})})
    assert rank_pool.run(2, train_recipe, job, store, tmp_path, 16) == ["stopped"] * 2
    folders = checkpoints(run_folder(tmp_path, job.saes[0]))
    assert [folder.name for folder in folders] == ["step-00000010", "step-00000016"]
    return job, store, tmp_path, folders[-1]


def test_a_folder_without_its_shared_file_is_ignored(rank_pool, stopped, whole):
    job, store, out, newest = stopped
    (newest / "shared.safetensors").unlink()
    assert len(checkpoints(newest.parents[1])) == 1
    rank_pool.run(4, train_recipe, job, store, out)
    assert not newest.exists() and contents(newest.parents[1])["metrics"] == contents(
        run_folder(whole, job.saes[0]))["metrics"]


@pytest.mark.parametrize("harm", ["missing", "cut short", "of another step", "shared file cut short"])
def test_a_damaged_checkpoint_is_one_line_that_names_the_file(rank_pool, stopped, harm):
    job, store, out, newest = stopped
    name = "shared.safetensors" if harm.startswith("shared") else "shard-003-of-004.safetensors"
    path = newest / name
    if harm == "missing":
        path.unlink()
    elif harm == "of another step":
        shutil.copy(newest.with_name("step-00000010") / name, path)
    else:
        path.write_bytes(path.read_bytes()[:-100])
    told, silent = (rank_pool.run(2, train_recipe, job, store, out)[:: 1 if harm.startswith("shared") else -1])
    assert silent == "another rank failed"
    assert str(path) in told and "\n" not in told and "an earlier checkpoint is used" in told
    with pytest.raises(UserError, match=name):
        read_checkpoint(newest)


def test_a_run_goes_on_with_the_same_shards_alone(stopped):
    job, store, out, _ = stopped
    other = job.model_copy(update={"train": job.train.model_copy(update={"shards": 2})})
    with pytest.raises(UserError, match=r"holds a different run .*: train\.shards is 4 there, 2 here"):
        list(train_from_store(other, other.saes, open_store(store), out))


def test_one_shard_is_the_run_that_it_was_before_there_were_shards(job):
    job, _ = job
    tree = job.model_dump(mode="json")
    del tree["train"]["shards"]
    before = Recipe.model_validate(tree)
    one = job.model_copy(update={"train": job.train.model_copy(update={"shards": 1})})
    for sae in job.saes:
        assert before.run_hash(sae) == one.run_hash(sae) != job.run_hash(sae)
        assert "shards" not in before.run_identity(sae)["train"]


@pytest.mark.parametrize(("change", "said"), [
    ({"activation": "groupmax", "d_sae": 297, "k": 9}, "does not divide the 9 groups"),
    ({"train": {"shards": 400}}, r"over its d_sae \(300\)")])
def test_what_is_not_trained_in_shards_is_refused(tmp_path, change, said):
    sae = {"layer": 1, "d_sae": 300, "k": 8} | change
    with pytest.raises(ValueError, match=rf"saes\.0: train\.shards is \d+, .*{said}"):
        recipe(tmp_path, saes=[sae], train__shards=2)


def test_teams_get_even_shares_and_keep_a_site_together(tmp_path):
    sizes = {1: [512, 512], 7: [512, 256, 256]}
    job = recipe(tmp_path, saes=[{"layer": layer, "d_sae": size, "k": 8, "name": f"{layer}-{number}"}
                                 for layer, group in sizes.items() for number, size in enumerate(group)])
    assert [[sae.id for sae in share] for share in share_out(job.saes, 2)] == [["1-0", "1-1"], ["7-0", "7-1", "7-2"]]
    assert share_out(job.saes, 1) == [job.saes]
    assert [len(share) for share in share_out(job.saes[:2], 4)] == [0, 1, 0, 1]
