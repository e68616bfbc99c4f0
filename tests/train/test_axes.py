"""Training along the principal axes of the rows gives a coder of unrotated rows."""

import json
import shutil

import pytest
import torch

from helpers import checkpoint_contents, recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.errors import UserError
from olmoscope.model.load import pick_device
from olmoscope.model.splice import load_causal_lm
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.store import Model
from olmoscope.sae.axes import fold_axes
from olmoscope.sae.io.open import open_sae
from olmoscope.site import Site
from olmoscope.train.axes import principal_axes
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.finish import ModelLoss, SequenceReader, draw_steps
from olmoscope.train.group import train_from_store
from olmoscope.train.initialize import initialize
from olmoscope.train.run import run_folder
from shard_jobs import contents, train_recipe

CODERS = {"plain": {"weights": "untied"}, "tied": {}, "batchtopk": {"weights": "untied", "activation": "batchtopk"},
          "shards": {"weights": "untied", "train": {"shards": 2}}}


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(seed, width):
    return torch.linalg.qr(randn(seed, width, width).double())[0]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axes")
    write_documents(folder / "corpus", count=200)
    return recipe(folder / "corpus", model__dtype="float32", tokens__count=9000, activations={"layers": [2]},
                  saes=[{"layer": 2, "d_sae": 256, "k": 8, "name": name, **coder} for name, coder in CODERS.items()],
                  train={"batch": 64, "dead_window": 1000, "axes": "principal", "checkpoint_every": 60,
                         "checkpoints": "all"})


@pytest.fixture(scope="module")
def store(job, tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "train"
    collect(job, "train", path)
    return open_store(path)


@pytest.fixture(scope="module")
def out(job, store, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    list(train_from_store(job, job.saes, store, out))
    return out


def spec_of(job, name):
    return next(sae for sae in job.saes if sae.id == name)


def test_the_axes_are_orthogonal_and_the_same_with_any_number_of_threads():
    x_ND = randn(0, 500, 40) * torch.arange(1, 41) @ rotation(1, 40).float() + 7
    axes_DD = principal_axes(x_ND)
    torch.testing.assert_close(axes_DD.T @ axes_DD, torch.eye(40), atol=1e-5, rtol=0)
    spread_DD = torch.cov((x_ND @ axes_DD).T)
    assert (spread_DD - spread_DD.diag().diag()).abs().max() < 1e-3 * spread_DD.diag().max()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(principal_axes(x_ND), axes_DD) and torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("tied", [True, False])
def test_folded_axes_change_no_code(tied):
    sae = initialize(10, 20, 4, "none", randn(1, 10), 0, tied=tied).to(dtype=torch.float64)
    axes_DD, x_BD = rotation(2, 10), randn(4, 30, 10).double()
    wanted, found = sae.reconstruct(x_BD @ axes_DD), fold_axes(sae, axes_DD).reconstruct(x_BD)
    torch.testing.assert_close(found[0], wanted[0] @ axes_DD.T)
    torch.testing.assert_close(found[1].values, wanted[1].values)
    assert fold_axes(sae, axes_DD).tied == tied and fold_axes(sae, None) is sae


@pytest.mark.parametrize("name", CODERS)
def test_runs_are_saes_of_rows_as_they_are(job, store, out, name):
    """On rows of the store, a run's SAE has at most the error that training reports."""
    run = run_folder(out, spec_of(job, name))
    x_BD = store.read(Site(2), 0, slice(0, 2000)).float()
    y_BD, codes = open_sae(run).sae.reconstruct(x_BD)
    said = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert ((y_BD - x_BD).square().sum(1) / x_BD.square().sum(1)).mean() < 1.05 * said < 0.1
    assert 0 < codes.l0().double().mean() <= 4 * 8


def test_going_on_from_a_checkpoint_is_the_same(job, store, out, tmp_path):
    spec = spec_of(job, "plain")
    whole, half = run_folder(out, spec), run_folder(tmp_path, spec)
    shutil.copytree(whole, half)
    (half / "done.json").unlink()
    for path in checkpoints(half)[1:]:
        path.unlink()
    list(train_from_store(job, [spec], store, tmp_path))
    assert "resumed after step 60" in (half / "training.log").read_text()
    assert checkpoint_contents(checkpoints(half)[-1]) == checkpoint_contents(checkpoints(whole)[-1])


def test_two_ranks_make_the_same(job, store, out, rank_pool, tmp_path):
    spec = spec_of(job, "shards")
    alone = job.model_copy(update={"saes": [spec]})
    assert rank_pool.run(2, train_recipe, alone, store.path, tmp_path) == [["shards"], []]
    assert contents(run_folder(tmp_path, spec)) == contents(run_folder(out, spec))


def test_the_models_own_loss_pulls_along_the_axes(store):
    model, site = load_causal_lm(Model(name="tiny", dtype="float32"), pick_device("cpu")), Site(2)
    reader = SequenceReader(lambda: model, [site], store.path, apart=False)
    read = reader.read(draw_steps(store.path, 1, 300, seed=0)[0])
    x_BD = read.rows[site]
    axes_DD = rotation(1, x_BD.shape[1]).float()
    rows = x_BD + 0.1 * randn(2, *x_BD.shape), x_BD, randn(3, *x_BD.shape)
    wanted_BD = ModelLoss(reader, site, 1.0).pull(read, *rows)
    found_BD = ModelLoss(reader, site, 1.0, axes_DD).pull(read, *(each @ axes_DD for each in rows))
    torch.testing.assert_close(found_BD @ axes_DD.T, wanted_BD, atol=1e-3 * float(wanted_BD.abs().max()), rtol=1e-2)


@pytest.mark.parametrize("change", [{"normalize": "layer_norm"}, {"reads": ["layers.3", "layers.7"], "layer": None}])
def test_what_has_no_such_axes(change):
    sae = {"layer": 3, "d_sae": 64, "k": 4, "train": {"axes": "principal"}} | change
    sae = {key: value for key, value in sae.items() if value is not None}
    with pytest.raises(UserError, match=r"saes.0: train.axes: principal is for SAEs of one site that do not normalise"):
        load_recipe("tiny", overrides=[f"saes=[{json.dumps(sae)}]"])


def test_a_recipe_that_says_channels_is_what_it_was():
    plain, stated, along = (load_recipe("tiny", overrides=[f"train.{key}"])
                            for key in ("seed=null", "axes=channels", "axes=principal"))
    identities = [each.run_identity(each.saes[0]) for each in (plain, stated, along)]
    assert identities[0] == identities[1] != identities[2]
