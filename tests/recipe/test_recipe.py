"""Recipes: what is read, and how each mistake is named."""

import pytest
import yaml

from helpers import recipe, write_documents
from olmoscope.errors import UserError
from olmoscope.recipe.load import load_recipe

# The table of the public release dams2005/olmo-3-7b-think-saes.
RELEASE = [
    ("layer_07/width_131k/topk_64_raw", 7, 131072, 64, "none", True),
    ("layer_07/width_163k/topk_64_layernorm", 7, 163840, 64, "layer_norm", False),
    ("layer_15/width_163k/topk_64_raw", 15, 163840, 64, "none", True),
    ("layer_15/width_163k/topk_64_layernorm", 15, 163840, 64, "layer_norm", False),
    ("layer_23/width_163k/topk_64_raw", 23, 163840, 64, "none", False),
    ("layer_23/width_163k/topk_128_raw", 23, 163840, 128, "none", True),
    ("layer_31/width_163k/topk_128_raw", 31, 163840, 128, "none", True),
]


@pytest.mark.parametrize(("form", "weights"), [("default", "untied"), ("reference", "tied")])
def test_the_seven_saes(form, weights):
    saes = load_recipe("olmo3-7b-think", form).saes
    assert [(s.id.removesuffix("_untied"), s.site.layer, s.d_sae, s.k, s.normalize, s.canonical)
            for s in saes] == RELEASE
    assert {sae.weights for sae in saes} == {weights}


def test_the_reference_form_is_the_reference_recipe():
    reference = load_recipe("olmo3-7b-think", "reference")
    train = reference.train
    assert (train.batch, train.lr, train.decay, train.betas, train.order, train.epochs) == (
        256, 3e-4, 0, (0.9, 0.999), "reading", 1)
    assert train.auxiliary is None and not train.scale_biases and train.adam == "exact" and train.moments == "float32"
    assert reference.text.mixture == "shards"
    assert reference.tokens.chunk_lengths == [(512, 2048), (3500, 5000), (7000, 8192)]
    assert (reference.tokens.count, reference.tokens.documents) == (20_000_000, "share")
    default = load_recipe("olmo3-7b-think")
    assert default.train.order == "shuffled" and default.text.mixture != "shards"
    assert default.tokens.count == reference.tokens.count


@pytest.mark.parametrize("name", ["tiny", "smollm2", "olmo3-7b-think"])
def test_a_resolved_recipe_reads_back_equal(name, tmp_path):
    for form in {"tiny": ["default"], "smollm2": ["default", "wide", "faithful"]}.get(name, ["default", "reference"]):
        resolved = load_recipe(name, form, ["model.dtype=bfloat16"])
        (tmp_path / "recipe.yaml").write_text(resolved.to_yaml())
        again = load_recipe(str(tmp_path / "recipe.yaml"))
        assert again == resolved
        assert [again.run_hash(sae) for sae in again.saes] == [resolved.run_hash(sae) for sae in resolved.saes]


def test_tied_weights_have_one_rate():
    with pytest.raises(UserError, match=r"train.decoder_rate: all SAEs have tied weights"):
        load_recipe("olmo3-7b-think", "reference", ["train.decoder_rate=2"])


def test_overrides():
    changed = load_recipe("tiny", overrides=["train.lr=1e-3", "saes.0.k=7", "text.mixture={modules: 1, questions: 2}",
                                             "device=cpu"])
    assert (changed.train.lr, changed.saes[0].k, changed.device) == (1e-3, 7, "cpu")
    assert changed.text.mixture == {"modules": 1, "questions": 2}


@pytest.mark.parametrize(("override", "message"), [
    ("train.lr=fast", r"recipe tiny: train.lr: .*number.* \(it says 'fast'\)"),
    ("train.lr=-1", r"train.lr: .*greater than 0 \(it says -1\)"),
    ("trian.lr=1", "trian: unknown key"),
    ("train.learning_rate=1", "train.learning_rate: unknown key"),
    ("saes.0.k=5000", r"saes.0: k \(5000\) is over d_sae \(4096\)"),
    ("saes.0.k=0", "saes.0.k: .*greater than or equal to 1"),
    ("saes.0.layer=2", r"saes.0: layers.2 is not collected \(activations.sites: layers.3, layers.7\)"),
    ("saes.9.k=1", "there is no key saes.9.k"),
    ("train.dead_window.x=1", "there is no key train.dead_window.x"),
    ("train.batch", "is not of the form key.path=value"),
    ("activations.layers=[3, 1]", "sites must be in the order of the model, without repeats: layers.1, layers.3"),
    ("model.num_layers=7", r"layers.7 is out of range; the model has layers 0 to 6"),
    ("text.mixture={modules: 1}", r"mixture has weights for \['modules'\]"),
    ("text.sources.0.kind=web", "text.sources.0: .*'web'.*does not match"),
    ("tokens.chunk_lengths=[[9, 5]]", r"bucket \(9, 5\) is empty"),
    ("tokens.segment_rows=100", "must hold the longest chunk"),
    ("device=tpu", "device: .*'cpu'.*'tpu'"),
    ("seed=-1", "seed: "),
])
def test_every_mistake_is_named(override, message):
    with pytest.raises(UserError, match=message) as raised:
        load_recipe("tiny", overrides=[override])
    assert "\n" not in str(raised.value)


def test_files_and_forms_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no recipe 'nothing'.*\(olmo3-7b-think, smollm2, tiny\)"):
        load_recipe("nothing")
    with pytest.raises(UserError, match="has no form 'best'; it has: default, reference"):
        load_recipe("olmo3-7b-think", "best")
    for content, message in (("a: [", "is not YAML"), ("- 1", "its top level must be a mapping"),
                             ("", "its top level must be a mapping"), ("name: x", "text: missing")):
        (tmp_path / "recipe.yaml").write_text(content)
        with pytest.raises(UserError, match=message) as raised:
            load_recipe(str(tmp_path / "recipe.yaml"))
        assert "\n" not in str(raised.value)


def test_the_same_sae_twice_is_refused(tmp_path):
    write_documents(tmp_path)
    tree = yaml.safe_load(recipe(tmp_path).to_yaml())
    tree["saes"].append(tree["saes"][0] | {"canonical": True})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="layer_01/width_512/topk_8_raw appears twice"):
        load_recipe(str(tmp_path / "recipe.yaml"))


def test_variants_have_ids_of_their_own_and_senseless_ones_are_refused(tmp_path):
    base = {"layer": 1, "d_sae": 512, "k": 8}
    variants = [{}, {"weights": "untied"}, {"activation": "batchtopk"}, {"activation": "jumprelu"},
                {"activation": "groupmax"}, {"matryoshka": [0.25]}, {"activation": "batchtopk", "matryoshka": [0.25]}]
    job = recipe(tmp_path, saes=[base | variant for variant in variants])
    assert [sae.id.rpartition("/")[2] for sae in job.saes] == [
        "topk_8_raw", "topk_8_raw_untied", "batchtopk_8_raw", "jumprelu_8_raw", "groupmax_8_raw",
        "matryoshka-topk_8_raw", "matryoshka-batchtopk_8_raw"]
    assert len({job.run_hash(sae) for sae in job.saes}) == len(variants)
    for variant, message in (
            ({"activation": "relu"}, "saes.0.activation"),
            ({"activation": "groupmax", "k": 7}, r"d_sae \(512\) is not a multiple of k \(7\)"),
            ({"activation": "groupmax", "matryoshka": [0.5]}, "leave out one of activation: groupmax and matryoshka"),
            ({"matryoshka": [0.5, 0.25]}, r"must ascend; of 512 latents they are \[256, 128\]"),
            ({"matryoshka": [0.25, 0.25001]}, "must ascend"), ({"matryoshka": [0.9999]}, "must ascend"),
            ({"matryoshka": [1.0]}, "saes.0.matryoshka"), ({"matryoshka": [0]}, "saes.0.matryoshka")):
        tree = yaml.safe_load(job.to_yaml()) | {"saes": [base | variant]}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
        with pytest.raises(UserError, match=message) as raised:
            load_recipe(str(tmp_path / "recipe.yaml"))
        assert "\n" not in str(raised.value)
    tree = yaml.safe_load(job.to_yaml())
    tree["train"]["candidates"] = {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="groupmax needs all pre-activations; leave out"):
        load_recipe(str(tmp_path / "recipe.yaml"))


def test_hashes_change_with_what_decides_the_result_only(tmp_path):
    base = recipe(tmp_path)
    same = [recipe(tmp_path, train__log_every=9), recipe(tmp_path, train__checkpoint_every=9)]
    other_run = [recipe(tmp_path, train__lr=0.5), recipe(tmp_path, train__order="reading")]
    other_store = [recipe(tmp_path, seed=1), recipe(tmp_path, tokens__count=3001),
                   recipe(tmp_path, model__revision="x")]
    sae = base.saes[0]
    assert {r.run_hash(sae) for r in same} == {base.run_hash(sae)}
    assert {r.store_hash() for r in other_run} == {base.store_hash()}
    assert len({r.run_hash(sae) for r in [base, *other_run, *other_store]}) == 6
    assert len({r.store_hash() for r in [base, *other_store]}) == 4
