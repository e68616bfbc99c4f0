"""The rows that transcoders and crosscoders train on; their checkpoints are coders of plain rows."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from helpers import recipe, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import open_store
from olmoscope.errors import UserError
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.pipeline import collect_stores, evaluate_saes, train_saes
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import CoderConfig, Live
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.scales import fold_scales
from olmoscope.sae.topk import TopK
from olmoscope.site import Site
from olmoscope.train.ends import ends_of, scales_for
from olmoscope.train.group import train_from_store
from olmoscope.train.initialize import initialize, initialize_transcoder
from olmoscope.train.refusals import refuse_other_store
from olmoscope.train.run import run_folder

SITES = ["layers.1", "layers.2.mlp.in", "layers.2.mlp.out", "layers.2"]
SMALL = {"d_sae": 96, "k": 6, "weights": "untied"}
CODERS = [{"site": "layers.2.mlp.out", **SMALL}, {"reads": "layers.2.mlp.in", "writes": "layers.2.mlp.out", **SMALL},
          {"reads": "layers.2.mlp.in", "writes": "layers.2.mlp.out", "skip": True, **SMALL, "activation": "jumprelu"},
          {"reads": ["layers.1", "layers.2"], **SMALL}, {"reads": ["layers.1", "layers.2"], **SMALL, "weights": "tied"}]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    write_documents(folder / "corpus")
    return recipe(folder / "corpus", activations={"sites": SITES}, saes=CODERS, model__dtype="float32",
                  evaluate={"tokens": 300}), folder / "out"


@pytest.fixture(scope="module")
def out(job):
    made, folder = job
    collect_stores(made, folder)
    assert all(fresh for _, fresh in train_saes(made, folder, []))
    assert all(fresh for _, fresh in evaluate_saes(made, folder, []))
    return folder


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_scales_bring_sites_to_one_size():
    sizes = {Site(1): 10.0, Site(2): 40.0, Site(3, "mlp.out"): 5.0}
    widths = {Site(1): 4, Site(2): 4, Site(3, "mlp.out"): 16}
    crosscoder = CoderConfig(reads=[Site(1), Site(2)], d_sae=8, k=2)
    assert scales_for(crosscoder, widths, sizes.__getitem__) == pytest.approx((2.0, 0.5))
    transcoder = CoderConfig(reads=[Site(1)], writes=[Site(3, "mlp.out")], d_sae=8, k=2, weights="untied")
    assert scales_for(transcoder, widths, sizes.__getitem__) == pytest.approx((5 / 4 / (10 / 2),))
    assert scales_for(CoderConfig(layer=1, d_sae=8, k=2), widths, sizes.__getitem__) == (1.0,)
    assert scales_for(crosscoder, widths, lambda site: 0.0) == (1.0, 1.0)  # rows of zeros stay unchanged


def test_an_sae_is_given_the_very_rows():
    rows_BD = randn(0, 5, 4).bfloat16()
    ends = ends_of(CoderConfig(layer=1, d_sae=8, k=2), {Site(1): 4}, (1.0,))
    x_BD, target_BD = ends.rows({Site(1): rows_BD})
    assert x_BD is rows_BD and target_BD is None


@pytest.mark.parametrize("skip", [False, True])
def test_folded_scales_change_no_code_of_a_transcoder(skip):
    coder = initialize_transcoder(20, 4, randn(1, 6), randn(2, 5), 0, "t", skip=skip).to(dtype=torch.float64)
    if skip:
        coder.W_skip.copy_(randn(3, 5, 6))
    x_BD, plain = randn(4, 30, 6).double(), fold_scales(coder, [0.25], [6])
    wanted, found = coder.reconstruct(0.25 * x_BD), plain.reconstruct(x_BD)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1].values, wanted[1].values)


@pytest.mark.parametrize("tied", [True, False])
def test_folded_scales_change_no_code_of_a_crosscoder(tied):
    coder = initialize(10, 20, 4, "none", randn(1, 10), 0, tied=tied).to(dtype=torch.float64)
    scales_D = torch.tensor([0.5] * 6 + [3.0] * 4, dtype=torch.float64)
    x_BD, plain = randn(4, 30, 10).double(), fold_scales(coder, [0.5, 3.0], [6, 4])
    wanted, found = coder.reconstruct(x_BD * scales_D), plain.reconstruct(x_BD)
    torch.testing.assert_close(found[0], wanted[0] / scales_D)
    torch.testing.assert_close(found[1].values, wanted[1].values)
    assert fold_scales(coder, [1.0, 1.0], [6, 4]) is coder


def test_runs_are_coders_of_plain_rows(job, out):
    """A run's coder reconstructs the store's rows as well as its training reports."""
    made, _ = job
    store = open_store(out / "store" / "train")
    rows = {site: store.read(site, 0, slice(0, 500)).float() for site in store.manifest.sites}
    for spec in made.saes:
        opened = open_sae(run_folder(out, spec))
        assert (opened.reads, opened.writes) == (tuple(spec.reads), tuple(spec.writes or spec.reads))
        y_BD, codes = opened.sae.reconstruct(torch.cat([rows[site] for site in opened.reads], dim=1))
        wanted_BD = torch.cat([rows[site] for site in opened.writes], dim=1)
        assert ((y_BD - wanted_BD).square().sum(1) / wanted_BD.square().sum(1)).mean() < 0.7, spec.id
        assert 0 < codes.l0().double().mean() <= 4 * spec.k


def test_each_site_that_is_written_is_measured(job, out):
    made, _ = job
    for spec in made.saes:
        found = read_evaluation(run_folder(out, spec) / EVALUATION)
        assert found.site == (spec.writes or spec.reads)[-1] and 0 < found.nmse < 1
        assert found.reads == (None if spec.sites == [spec.site] else spec.reads)
        if len(spec.reads) > 1:
            assert [one.site for one in found.by_site] == spec.reads
            last = found.by_site[-1]
            assert (last.nmse, last.delta_ce, last.kl) == (found.nmse, found.language.delta_ce, found.language.kl)
            shares = sum(one.decoder_norm.mean for one in found.by_site)
            assert 1 <= shares <= len(spec.reads) ** 0.5 + 1e-9
        else:
            assert found.by_site is None


def test_a_transcoder_in_the_models_place_is_a_hook_there(job, out):
    """ΔCE equals that of a plain hook on the module itself, with transformers' own cross-entropy."""
    from olmoscope.evaluate.evaluate import Setting, evaluate_on_text
    from olmoscope.evaluate.sequences import read_sequences
    from olmoscope.model.splice import load_causal_lm
    from olmoscope.tokens.tokenizer import load_tokenizer

    made, _ = job
    opened = open_sae(run_folder(out, made.saes[1]))
    model = load_causal_lm(made.model, torch.device("cpu"), made.activations.sites)
    sequences = read_sequences(out / "store" / "held_out", load_tokenizer(made.model), apart=False, stored=())
    setting = Setting(sequences, sequences.rows, 256, "a text", "float32", out)
    found, = evaluate_on_text([opened], model, setting)
    layer = model.layers[2]
    seen = {}
    losses = {"clean": [], "spliced": []}
    for number in range(len(sequences.starts) - 1):
        first, end = sequences.starts[number : number + 2]
        ids = torch.from_numpy(sequences.token_ids[first:end]).long()[None]
        take = layer.mlp.register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
        with torch.no_grad():
            losses["clean"].append(token_losses(model.module, ids))
            put = layer.post_feedforward_layernorm.register_forward_hook(
                lambda module, given, output: opened.sae.reconstruct(seen["x"])[0])
            losses["spliced"].append(token_losses(model.module, ids))
        take.remove()
        put.remove()
    clean, spliced = (torch.cat(parts).mean() for parts in losses.values())
    assert found.language.ce_clean == pytest.approx(float(clean), abs=1e-5)
    assert found.language.ce_spliced == pytest.approx(float(spliced), abs=1e-4)


def token_losses(module, ids):
    logits = module(input_ids=ids, use_cache=False).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


@pytest.mark.parametrize("number", range(1, len(CODERS)))
def test_training_goes_on_bit_for_bit(job, out, tmp_path, number):
    """From a checkpoint in the middle, with nothing later there, as a kill leaves it."""
    made, _ = job
    spec, store = made.saes[number], open_store(out / "store" / "train")
    train = made.train.model_copy(update={"checkpoint_every": 4, "checkpoints": "all"})
    kept = made.model_copy(update={"train": train})
    list(train_from_store(kept, [spec], store, tmp_path / "whole", None))
    whole, half = (run_folder(tmp_path / name, spec) for name in ("whole", "half"))
    shutil.copytree(whole, half)
    (half / "done.json").unlink()
    paths = sorted((half / "checkpoints").iterdir())
    assert len(paths) > 3
    for path in paths[2:]:
        path.unlink()
    list(train_from_store(kept, [spec], store, tmp_path / "half", None))
    assert "resumed after step 8" in (half / "training.log").read_text()
    mine, theirs = (load_file(folder / "checkpoints" / paths[-1].name) for folder in (half, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_live_stream_trains_them_too(job, tmp_path):
    made, _ = job
    live = made.model_copy(update={"saes": made.saes[1:4],
                                   "train": made.train.model_copy(update={"live": Live(rows=1000)})})
    for spec, fresh in train_saes(live, tmp_path, []):
        line = json.loads((run_folder(tmp_path, spec) / "metrics.jsonl").read_text().splitlines()[-1])
        assert fresh and 0 < line["loss"] < 1, spec.id


@pytest.mark.parametrize(("entry", "message"), [
    ({"reads": "layers.2.mlp.in", "writes": "layers.2.mlp.out"}, "encoder and decoder are two matrices: set weights"),
    ({"site": "layers.2", "writes": "layers.2.mlp.out"}, "site is for an SAE, which writes what it reads"),
    ({"layer": 2, "site": "layers.2"}, "layer and site both name what is read"),
    ({"reads": "layers.2", "writes": "layers.2"}, "writes: leave it out if it is the same as what is read"),
    ({"reads": ["layers.1", "layers.2"], "writes": "layers.2.mlp.out"}, "a transcoder reads one site and writes one"),
    ({"reads": "layers.2.mlp.out", "writes": "layers.2.mlp.in", "weights": "untied"}, "the model reaches earlier"),
    ({"reads": ["layers.1", "layers.1"]}, "reads names a site twice"),
    ({"site": "layers.2", "skip": True}, "skip is for a transcoder"),
    ({"reads": ["layers.1", "layers.2"], "normalize": "layer_norm"}, "normalize: layer_norm is for SAEs of one site"),
    ({"site": "layers.2.attn.z"}, r"layers\.2\.attn\.z is not collected"),
    ({"site": "layers.2.mlp"}, r"'layers\.2\.mlp' is not a site"),
])
def test_mistakes_in_coders_are_one_line(job, tmp_path, entry, message):
    made, _ = job
    path = tmp_path / "recipe.yaml"
    path.write_text(made.model_copy(update={"saes": made.saes[:1]}).to_yaml())
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(str(path), overrides=[f"saes=[{json.dumps(entry | {'d_sae': 96, 'k': 6})}]"])
    assert "\n" not in str(caught.value)


def test_a_transcoder_of_widths_that_differ_needs_no_skip_but_may_have_one():
    coder = initialize_transcoder(20, 4, randn(1, 6), randn(2, 5), 0, "t", skip=True)
    assert isinstance(coder, TopK) and coder.W_skip.shape == (5, 6)


def test_a_store_that_lacks_a_site_is_named(job, out, tmp_path):
    made, _ = job
    fewer = made.model_copy(update={"activations": made.activations.model_copy(update={"sites": [Site(1)]}),
                                    "saes": [CoderConfig(layer=1, **SMALL)]})
    collect(fewer, "train", tmp_path / "store")
    with pytest.raises(UserError, match=r"has no rows of layers\.2\.mlp\.in \(it has layers\.1\)"):
        refuse_other_store(made, made.saes[1], open_store(tmp_path / "store"))
