"""A crosscoder over two models that read the same tokens: collected, trained, measured in both, indexed."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import olmoscope
from helpers import recipe, small_model, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.format import read_manifest
from olmoscope.activations.store.reader import open_store
from olmoscope.activations.store.verify import verify_stores
from olmoscope.cost.measure import measure
from olmoscope.cost.plan import plan
from olmoscope.errors import UserError
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.features.rows_of import index_sae
from olmoscope.files import sha256
from olmoscope.model.splice import load_causal_lm
from olmoscope.pipeline import collect_stores, evaluate_saes, train_saes
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import Model
from olmoscope.sae.io.open import open_sae
from olmoscope.site import Site
from olmoscope.train.run import run_folder

BOTH = {"reads": ["layers.3", "base:layers.3"], "d_sae": 512, "k": 8, "weights": "untied"}
TINY = Path(str(resources.files("olmoscope") / "model" / "tiny"))
BASE = Site(3, model="base")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny model, with perturbed weights."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    shaken = {name: tensor + 0.2 * tensor.float().std() * torch.randn_like(tensor) if tensor.ndim > 1 else tensor
              for name, tensor in tensors.items()}
    save_file(shaken, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def job(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=90)
    return recipe(folder / "corpus", models={"base": {"name": str(base), "dtype": "float32"}},
                  activations={"sites": ["layers.3", "base:layers.3"]},
                  saes=[{"layer": 3, "d_sae": 512, "k": 8}, BOTH], evaluate={"tokens": 300})


@pytest.fixture(scope="module")
def out(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    collect_stores(job, out)
    list(train_saes(job, out, []))
    list(evaluate_saes(job, out, []))
    return out


def test_each_model_s_rows_are_what_it_gives_of_the_same_tokens(job, base, out, tmp_path):
    assert (read_manifest(out / "store" / "train").of, read_manifest(out / "store" / "train-2").of) == (None, "base")
    alone = recipe(tmp_path, model={"name": str(base), "dtype": "float32"}, activations={"layers": [3]},
                   saes=[{"layer": 3, "d_sae": 512, "k": 8}]).model_copy(update={"text": job.text})
    collect(alone, "train", tmp_path / "store")
    for part in ("layer_03", "tokens", "rows"):
        mine, theirs = (sorted((store / part).glob("*.safetensors")) for store in
                        (out / "store" / "train-2", tmp_path / "store"))
        assert [sha256(path) for path in mine] == [sha256(path) for path in theirs]
    store = open_store(out / "store" / "train")
    assert store.manifest.sites == [Site(3), BASE]
    x, y = (store.read(site, 0, slice(0, 50)).float() for site in store.manifest.sites)
    norms = store.read_rows(0)
    assert torch.allclose(norms["norm_03"][:50], x.norm(dim=1), rtol=1e-2)
    assert torch.allclose(norms["norm_base_layer_03"][:50], y.norm(dim=1), rtol=1e-2)
    assert not torch.equal(x, y)
    assert all(not one.problems for one in verify_stores(out))
    assert [one.segments_made for one in collect_stores(job, out)] == [0] * 4


def test_it_is_measured_in_both_models(job, base, out):
    spec = job.saes[1]
    found = read_evaluation(run_folder(out, spec) / EVALUATION)
    own, other = found.by_site
    assert (own.site, other.site) == (Site(3), BASE) and found.site == Site(3)
    assert 0 < own.nmse < 0.7 and 0 < other.nmse < 0.7
    assert own.decoder_norm.mean > 0 and other.decoder_norm.mean > 0
    # By plain hooks in both models, over the same tokens.
    opened = open_sae(run_folder(out, spec))
    models = [load_causal_lm(model, torch.device("cpu")) for model in (job.model, job.models["base"])]
    losses = {"own clean": [], "clean": [], "own": [], "other": []}
    store = out / "store" / "held_out"
    tokens = load_file(sorted((store / "tokens").glob("*.safetensors"))[0])
    order = torch.argsort(tokens["sequence_numbers"])
    left = job.evaluate.tokens
    for number in order.tolist():
        first, end = tokens["sequence_starts"][number : number + 2].tolist()
        ids = tokens["token_ids"][first : min(end, first + left)].long()[None]
        left -= ids.shape[1]
        with torch.no_grad():
            given = [model.module(input_ids=ids, output_hidden_states=True) for model in models]
            read = torch.cat([one.hidden_states[4] for one in given], dim=-1)
            parts = opened.sae.reconstruct(read)[0].split(256, dim=-1)
            losses["own clean"].append(loss_of(given[0].logits, ids))
            losses["clean"].append(loss_of(given[1].logits, ids))
            for name, model, part in zip(("own", "other"), models, parts, strict=True):
                hook = model.layers[3].register_forward_hook(lambda module, arguments, output, part=part: part)
                losses[name].append(loss_of(model.module(input_ids=ids).logits, ids))
                hook.remove()
        if not left:
            break
    own_clean, clean, own_spliced, spliced = (float(torch.cat(parts).mean()) for parts in losses.values())
    assert found.language.ce_clean == pytest.approx(own_clean, abs=1e-4)
    assert found.language.delta_ce == own.delta_ce == pytest.approx(own_spliced - own_clean, abs=1e-3)
    assert other.delta_ce == pytest.approx(spliced - clean, abs=1e-3)


def loss_of(logits, ids):
    return torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="none")


def test_the_sae_beside_it_is_what_it_is_without_the_other_model(job, out, tmp_path):
    alone = job.of_model("").model_copy(update={"saes": job.saes[:1]})
    assert alone.run_hash(alone.saes[0]) == job.alone(job.saes[0]).model_copy(update={"tokens": job.tokens}).run_hash(
        job.saes[0])
    copy = shutil.copytree(out, tmp_path / "out")
    assert [fresh for _, fresh in train_saes(alone, copy, [])] == [False]


def test_it_is_indexed_and_opened(job, out, tmp_path):
    run = run_folder(out, job.saes[1])
    assert index_sae(str(run), device="cpu").info.sae.name == job.saes[1].id
    text = str(out / "recipe.yaml")
    for command in (lambda: index_sae(str(run), text=text, out=tmp_path / "index"),
                    lambda: evaluate_anywhere([str(run)], Options(tmp_path / "out", text=text))):
        with pytest.raises(UserError, match=r"other models too \(base\), but only one model reads ") as caught:
            command()
        assert "\n" not in str(caught.value)
    coder = olmoscope.load(run)
    assert coder.reads == coder.writes == (Site(3), BASE)
    model = load_causal_lm(job.model, torch.device("cpu")).module
    with pytest.raises(UserError, match=r"base:layers\.3 is in another model, which the recipe calls base") as caught, \
            olmoscope.attach(model, coder):
        pass
    assert "\n" not in str(caught.value)


def test_the_resolved_recipe_reads_back(job, out):
    path = out / "recipe.yaml"
    assert load_recipe(str(path)).to_yaml() == path.read_text()
    assert load_recipe(str(path)).models == job.models


def test_a_store_takes_up_another_model_later(job, base, out, tmp_path):
    first = job.of_model("").model_copy(update={"saes": job.saes[:1]})
    collect_stores(first, tmp_path / "out")
    made = collect_stores(job, tmp_path / "out")
    assert [(one.store.name, one.segments_made > 0) for one in made] == [
        ("train", False), ("train-2", True), ("held_out", False), ("held_out-2", True)]
    other = job.model_copy(update={"models": {"base": job.models["base"].model_copy(update={"name": "tiny"})}})
    with pytest.raises(UserError, match=r"train-2 holds the store of another recipe: model.name is .* there, \"tiny"):
        collect_stores(other, tmp_path / "out")


def test_another_vocabulary_is_refused(job, tmp_path):
    model = small_model("Llama")
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        shutil.copy(TINY / name, tmp_path / "model" / name)
    tree = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tree))
    other = job.model_copy(update={"models": {"base": Model(name=str(tmp_path / "model"), dtype="float32")}})
    with pytest.raises(UserError, match=r"cannot read the tokens of .*: its tokenizer has another vocabulary"):
        collect_stores(other, tmp_path / "out")


@pytest.mark.parametrize(("changes", "message"), [
    ({"activations": {"sites": ["layers.3", "bas:layers.3"]}}, "models.base: no site of it is collected"),
    ({"models": {}}, "base:layers.3 is in a model that the recipe does not know; define it in models.base"),
    ({"activations": {"sites": ["base:layers.3"]}}, "name a site of the recipe's own model too"),
    ({"saes": [{"site": "base:layers.3", "d_sae": 512, "k": 8}]}, "write a recipe for that model"),
    ({"saes": [{"reads": "layers.3", "writes": "base:layers.3", "d_sae": 512, "k": 8, "weights": "untied"}]},
     "write a recipe for that model"),
    ({"models": {"1st": {"name": "tiny"}}}, "'1st' cannot name a model"),
    ({"models": {"base": {"name": "tiny", "num_layers": 3}}}, "base:layers.3 is out of range"),
    ({"train": {"live": {"rows": 1000}}}, "one model is read live, not several"),
    ({"activations": {"sites": ["layers.3", "base:layers.*.mid"]}}, "set models.base.num_layers"),
])
def test_mistakes_are_one_line(job, tmp_path, changes, message):
    tree = job.model_dump(mode="json") | changes
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_a_plan_counts_all_models(job, tmp_path):
    alone = job.of_model("").model_copy(update={"saes": job.saes[:1]})
    both, one = plan(job, tmp_path), plan(alone, tmp_path)
    assert both.collect_flops == 2 * one.collect_flops and both.collect_memory == one.collect_memory
    assert list(both.site_bytes) == [Site(3), BASE]
    rates = measure(job, batches=2, steps=1)
    assert rates.tokens_per_second > 0 and rates.sae.id == job.saes[0].id
