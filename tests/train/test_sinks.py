"""Attention sinks: found, reconstructed almost exactly, and the finished SAE is an ordinary one."""

import json
import shutil

import pytest
import torch

from helpers import checkpoint_contents, recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.model.load import load_model
from olmoscope.recipe.schema import CoderConfig, Train
from olmoscope.release.export import export_run
from olmoscope.sae.io.checkpoint import read_alive
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.sinks import fold_sinks
from olmoscope.sae.topk import TopK
from olmoscope.site import Site
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.find_sinks import find_sinks
from olmoscope.train.group import train_from_store
from olmoscope.train.run import run_folder
from shard_jobs import contents, train_recipe

SITE = Site(1)
SIZE = 4000.0
KINDS = {"topk": {"weights": "untied"}, "tied": {}, "batchtopk": {"activation": "batchtopk", "weights": "untied"},
         "jumprelu": {"activation": "jumprelu", "weights": "untied"},
         "matryoshka": {"matryoshka": [0.25], "weights": "untied"},
         "shards": {"weights": "untied", "train": {"shards": 2}},
         "axes": {"weights": "untied", "train": {"axes": "principal"}}}


def direction(width, seed=7):
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


def with_sinks(wanted, sites, device):
    """The tiny model, as if its layer 1 made a sink of the first position."""
    model = load_model(wanted, sites, device)

    def add(module, arguments, output):
        rows = output[0] if isinstance(output, tuple) else output
        size = SIZE * (1 + 0.2 * torch.sin(rows[:, 0, 0]))
        rows[:, 0] += size[:, None] * direction(rows.shape[-1])
        return output

    model.layers[1].register_forward_hook(add)
    return model


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=200)
    saes = [{"layer": 1, "d_sae": 512, "k": 8, "name": name, **kind} for name, kind in KINDS.items()]
    return recipe(folder / "corpus", activations={"layers": [1], "dtype": "float32"}, saes=saes, tokens__count=9000,
                  train__batch=64, train__lr=5e-3)


@pytest.fixture(scope="module")
def store(job, tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "train"
    collect(job, "train", path, load=with_sinks)
    return open_store(path)


@pytest.fixture(scope="module")
def out(job, store, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    list(train_from_store(job, job.saes, store, out))
    return out


def rows_of(store):
    """Ordinary rows, and sinks."""
    x_ND = torch.cat([store.read(SITE, segment, slice(0, rows)) for segment, rows in enumerate(store.segment_rows)])
    far_N = x_ND.norm(dim=1) > 10 * store.median_norm(SITE)
    assert 50 < far_N.sum() < 0.05 * len(x_ND)
    return x_ND[~far_N], x_ND[far_N]


def train_alone(job, spec, store, out):
    """Train with a recipe that has only this SAE."""
    list(train_from_store(job.model_copy(update={"saes": [spec]}), [spec], store, out))


@pytest.mark.parametrize("name", KINDS)
def test_sinks_are_reconstructed_and_ordinary_rows_lose_nothing(job, store, out, name, tmp_path):
    spec = next(sae for sae in job.saes if sae.id == name)
    ordinary_ND, sinks_ND = rows_of(store)
    sae = open_sae(run_folder(out, spec)).sae
    assert sae.d_sae == 512 and json.loads((run_folder(out, spec) / "done.json").read_text())["sinks"] == 1
    assert sae.W_dec[0] @ direction(256) > 0.99
    alive_F = read_alive(checkpoints(run_folder(out, spec))[-1], 1)
    assert len(alive_F) == 512 and alive_F[0] and not alive_F.all()  # it is not trained, and counts as alive

    without = spec.model_copy(update={"train": {"sinks": "off"}, "name": "without"})
    train_alone(job, without, store, tmp_path)
    plain = open_sae(run_folder(tmp_path, without)).sae
    errors = {}
    for called, one in (("sinks", sae), ("plain", plain)):
        for rows, x_ND in (("ordinary", ordinary_ND), ("far", sinks_ND)):
            error_N = (one.reconstruct(x_ND)[0] - x_ND).norm(dim=1)
            errors[called, rows] = float((error_N / x_ND.norm(dim=1)).square().mean())
            if (called, rows) == ("sinks", "far"):  # what is left of a sink is of ordinary size
                assert error_N.median() < ordinary_ND.norm(dim=1).median()
    # a tied SAE without latents for sinks learns them within this run, though not as well
    assert errors["sinks", "far"] < (1 if name == "tied" else 0.01) * errors["plain", "far"]
    assert errors["sinks", "ordinary"] < 1.02 * errors["plain", "ordinary"]
    values = sae.encode(ordinary_ND)
    assert not (values.values[values.indices == 0] > 0).any()  # only sinks activate their latent


def test_it_says_so(job, out):
    said = (run_folder(out, job.saes[0]) / "training.log").read_text()
    assert "1 latent is for attention sinks, rows of over 10 times the median norm along one direction" in said


def test_it_says_once_what_is_the_same_for_several(job, store, tmp_path, capsys):
    spec = job.saes[0]
    list(train_from_store(job, [spec, spec.model_copy(update={"name": "twin"})], store, tmp_path))
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("is for attention sinks") == 1
    assert "each of these 2: 1 latent is for attention sinks" in told


def test_going_on_from_a_checkpoint_is_the_same(job, store, out, tmp_path):
    spec = job.saes[0]
    kept = job.model_copy(update={"train": job.train.model_copy(update={"checkpoint_every": 20, "checkpoints": "all"})})
    list(train_from_store(kept, [spec], store, tmp_path / "whole"))
    half = run_folder(tmp_path / "half", spec)
    shutil.copytree(run_folder(tmp_path / "whole", spec), half)
    (half / "done.json").unlink()
    for path in checkpoints(half)[2:]:
        path.unlink()
    list(train_from_store(kept, [spec], store, tmp_path / "half"))
    assert "resumed after step 40" in (half / "training.log").read_text()
    last = [checkpoints(run)[-1] for run in (half, run_folder(tmp_path / "whole", spec), run_folder(out, spec))]
    assert len({json.dumps(checkpoint_contents(path), sort_keys=True) for path in last}) == 1


def test_two_ranks_find_the_same_and_split_the_rows_alike(job, store, out, rank_pool, tmp_path):
    spec = next(sae for sae in job.saes if sae.id == "shards")
    alone = job.model_copy(update={"saes": [spec]})
    assert rank_pool.run(2, train_recipe, alone, store.path, tmp_path) == [["shards"], []]
    assert contents(run_folder(tmp_path, spec)) == contents(run_folder(out, spec))


@pytest.mark.parametrize("name", ["topk", "tied", "jumprelu"])
def test_the_real_sae_lens_gives_the_same(job, store, out, name):
    """Splicing it in needs no extra rule: SAELens' own class reconstructs sinks as ours does."""
    sae_lens = pytest.importorskip("sae_lens")
    spec = next(sae for sae in job.saes if sae.id == name)
    run = run_folder(out, spec)
    export_run(run)
    theirs, ours = sae_lens.SAE.load_from_disk(str(run / "sae")), open_sae(run).sae
    for x_ND in rows_of(store):
        wanted_ND = ours.reconstruct(x_ND[:100])[0]
        with torch.no_grad():
            assert torch.allclose(theirs(x_ND[:100]), wanted_ND, rtol=1e-4, atol=1e-4 * float(wanted_ND.abs().max()))


def test_the_finished_sae_is_what_was_trained():
    """For any rows, it gives the sinks' part, and the trained latents' reconstruction of the rest."""
    torch.manual_seed(0)
    ordinary_ND = torch.randn(500, 16) + 3 * direction(16, 1)
    two_2D = torch.linalg.qr(torch.stack([direction(16, 2), direction(16, 3)]).T)[0].T
    two_2D[1] = 0.8 * two_2D[1] + 0.6 * two_2D[0]  # unit, and not at a right angle to the first
    outliers_ND = torch.cat([400 * (1 + 0.1 * torch.rand(30, 1)) * row + torch.randn(30, 16) for row in two_2D])
    sinks = find_sinks(outliers_ND, ordinary_ND)
    assert sinks.count == 2 and (sinks.directions_SD @ two_2D.T).abs().amax(dim=1).min() > 0.999
    trained = TopK(torch.randn(40, 16), torch.randn(40, 16), torch.randn(16), "none", b_latent=torch.randn(40), k=40)
    whole = fold_sinks(trained, sinks)
    whole = TopK(whole.W_enc, whole.W_dec, whole.b_in, "none", b_latent=whole.b_latent, k=42)
    for x_ND in (ordinary_ND, outliers_ND):
        seen_ND, rest_ND = sinks.split(x_ND)
        assert torch.allclose(whole.reconstruct(x_ND)[0], trained.reconstruct(seen_ND)[0] + x_ND - rest_ND, atol=2e-3,
                              rtol=1e-3)
    seen_ND, rest_ND = sinks.split(ordinary_ND)
    assert torch.equal(rest_ND, ordinary_ND)
    c_NS = seen_ND @ sinks.coordinates_SD.T
    assert torch.allclose(c_NS, sinks.usual_S.expand_as(c_NS), atol=1e-3)
    assert sinks.split(outliers_ND)[1].norm(dim=1).median() < 2 * ordinary_ND.norm(dim=1).median()


@pytest.mark.parametrize(("outliers", "why"), [
    (torch.empty(0, 16), "there are none"),
    (400 * direction(16, 2) + torch.randn(7, 16), "too few"),
    (100 * torch.randn(64, 16), "they share no direction"),
    (10 * direction(16, 2) + torch.randn(64, 16), "they are not apart from ordinary rows"),
])
def test_no_sinks(outliers, why):
    torch.manual_seed(0)
    assert find_sinks(outliers, torch.randn(500, 16) * 3) is None, why


@pytest.mark.parametrize(("between", "found"), [(3, True), (30, False)])
def test_a_few_rows_may_lie_between_ordinary_rows_and_sinks(between, found):
    """As in layer 24 of SmolLM2: two of 16,384 rows have 5 and 6 times the median norm, along the sinks' direction."""
    draw = torch.Generator().manual_seed(0)
    far_D = direction(16, 2)
    ordinary_ND = torch.randn(4000, 16, generator=draw)
    ordinary_ND[:between] += 30 * far_D
    outliers_ND = 200 * (1 + 0.1 * torch.rand(40, 1, generator=draw)) * far_D + torch.randn(40, 16, generator=draw)
    outliers_ND[0] = 60 * far_D  # and one that is hardly far enough
    sinks = find_sinks(outliers_ND, ordinary_ND)
    assert (sinks is not None) == found
    if sinks is not None:
        rest_ND = sinks.split(torch.cat([outliers_ND, ordinary_ND]))[1]
        assert rest_ND[1:40].norm(dim=1).max() < 25, "sinks are reconstructed"
        assert torch.equal(rest_ND[40 + between :], ordinary_ND[between:]), "the latent is silent on all others"


def shuffled(rows):
    """Rows of huge norm, each along a direction that has nothing to do with the others'."""
    return SIZE * torch.nn.functional.normalize(torch.sin(1000 * rows), dim=-1)


@pytest.mark.parametrize(("position", "far", "said"), [
    (0, lambda rows: 40 * rows, "4 latents are for attention sinks"),  # along those of the commonest first tokens
    (20, shuffled, "some rows have over 10 times the median norm, but they do not lie along directions"),
], ids=["several directions", "none"])
def test_rows_that_are_far_out_along_other_directions(job, tmp_path, capsys, position, far, said):
    def load(wanted, sites, device):
        model = load_model(wanted, sites, device)

        def enlarge(module, arguments, output):
            rows = output[0] if isinstance(output, tuple) else output
            rows[:, position : position + 1] = far(rows[:, position : position + 1])  # some sequences are shorter
            return output

        model.layers[1].register_forward_hook(enlarge)
        return model

    collect(job, "train", tmp_path / "train", load=load)
    list(train_from_store(job, job.saes[:1], open_store(tmp_path / "train"), tmp_path / "out"))
    told = " ".join(capsys.readouterr().err.split())
    assert said in told, told


def test_what_has_no_such_latents(job, store, tmp_path):
    """There are none for rows of one size, for groups, and with `off`."""
    for kind in ({"normalize": "layer_norm"}, {"activation": "groupmax"}, {"train": {"sinks": "off"}}):
        spec = CoderConfig(layer=1, d_sae=512, k=8, name="without", **kind)
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        list(train_from_store(job, [spec], store, out))
        assert json.loads((run_folder(out, spec) / "done.json").read_text())["sinks"] == 0


def test_rows_that_a_filter_leaves_out_have_their_latent(job, store, tmp_path):
    """`filter.max_norm` once made an SAE that ruined the model at the rows it had not been trained on."""
    spec = CoderConfig(layer=1, d_sae=512, k=8, weights="untied", train={"filter": {"max_norm": 10}})
    train_alone(job, spec, store, tmp_path)
    sae = open_sae(run_folder(tmp_path, spec)).sae
    ordinary_ND, sinks_ND = rows_of(store)
    assert (sae.reconstruct(sinks_ND)[0] - sinks_ND).norm(dim=1).median() < ordinary_ND.norm(dim=1).median()


def test_rows_left_out_and_not_reconstructed_are_warned_of(job, store, tmp_path):
    spec = CoderConfig(layer=1, d_sae=512, k=8, train={"filter": {"max_norm": 10}, "sinks": "off"})
    train_alone(job, spec, store, tmp_path)
    said = (run_folder(tmp_path, spec) / "training.log").read_text()
    assert "train.filter.max_norm leaves out rows that the SAE will still get when it is spliced into the model" in said


def test_the_setting_decides_the_run_and_runs_of_before_keep_their_hash(job):
    assert Train(sinks=False).sinks == "off"  # as YAML has it
    plain, off = job.saes[0], job.saes[0].model_copy(update={"train": {"sinks": "off"}})
    assert job.run_hash(plain) != job.run_hash(off)
    assert "sinks" not in job.run_identity(plain)["train"]
