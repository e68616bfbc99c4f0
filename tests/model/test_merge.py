"""Adapters made by PEFT itself are read like their merged model, or refused in one line."""

import json
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

from commands import run_forked
from helpers import recipe, save_small_model, save_tokenizer, small_model, write_documents
from hub_endpoint import COMMIT, NEXT
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.format import read_activations, read_manifest
from olmoscope.activations.store.verify import verify_stores
from olmoscope.browse.collection import open_collection
from olmoscope.errors import UserError
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.features.rows_of import index_sae
from olmoscope.model.config import config_at_hand, read_config
from olmoscope.model.describe import describe_model
from olmoscope.model.load import load_model
from olmoscope.model.splice import load_causal_lm
from olmoscope.model.unembed import load_unembedding
from olmoscope.model_source import at_revision, revision_here, revision_of
from olmoscope.pipeline import collect_stores, evaluate_saes, train_saes
from olmoscope.recipe.schema import Model
from olmoscope.release.build import build_release
from olmoscope.site import Site
from olmoscope.tokens.tokenizer import load_tokenizer
from olmoscope.train.run import run_folder

CPU = torch.device("cpu")
IDS = torch.arange(24)[None] * 31
LORA = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def model_of(folder, **settings):
    return Model(name=str(folder), dtype="float32", **settings)


def save_adapter(base, folder, config=None, seed=1, tokens=None, **saving):
    """A trained adapter of a base in a folder: PEFT's own files. Random weights take the place of training."""
    causal = transformers.AutoModelForCausalLM.from_pretrained(base)
    if tokens:
        causal.resize_token_embeddings(tokens)
    adapted = peft.get_peft_model(causal, config or peft.LoraConfig(**LORA))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and name.split(".")[-1] != "bias":
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder, **saving)
    return Path(folder)


def merged_by_hand(adapter, folder):
    """The adapter merged and saved as a whole model, as PEFT's documentation says."""
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()
    merged.save_pretrained(folder)
    save_tokenizer(folder)
    return Path(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_small_model("Llama", tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def adapter(base, tmp_path):
    return save_adapter(base, tmp_path / "adapter")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(load, model):
    with pytest.raises(UserError) as caught:
        load(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_loader_gives_the_merged_model(adapter, base, tmp_path):
    merged = merged_by_hand(adapter, tmp_path / "merged")
    with torch.no_grad():
        wanted = transformers.AutoModelForCausalLM.from_pretrained(merged)(IDS).logits
        plain = transformers.AutoModelForCausalLM.from_pretrained(base)(IDS).logits
        found = load_causal_lm(model_of(adapter), CPU).module(IDS).logits
    assert torch.equal(found, wanted) and not torch.allclose(found, plain, atol=0.1)
    for deepest in (0, 2):
        cut, same = (load_model(model_of(folder), [Site(deepest)], CPU) for folder in (adapter, merged))
        assert torch.equal(cut.layers[deepest].self_attn.q_proj.weight, same.layers[deepest].self_attn.q_proj.weight)
        assert (cut.layers_path, cut.base, same.base) == (same.layers_path, str(base), None)
    assert torch.equal(load_unembedding(model_of(adapter), CPU).U_VD, load_unembedding(model_of(merged), CPU).U_VD)
    described = describe_model(model_of(adapter), CPU)
    assert ("adapter of", str(base)) in described.facts and ("evaluate, browse", "yes") in described.works


def test_rows_collected_are_those_of_the_merged_model(adapter, base, tmp_path):
    write_documents(tmp_path / "corpus", count=30)
    stores = {}
    for name, folder in (("adapter", adapter), ("merged", merged_by_hand(adapter, tmp_path / "merged"))):
        job = recipe(tmp_path / "corpus", model__name=str(folder), activations__layers=[1, 2], tokens__count=600,
                     tokens__held_out=100, tokens__bos="no", saes=[{"layer": 1, "d_sae": 64, "k": 4}])
        stores[name] = collect(job, "train", tmp_path / name / "store").store
    for layer in (1, 2):
        one, other = (read_activations(store, Site(layer), 0, slice(0, 600)) for store in stores.values())
        assert len(one) and torch.equal(one, other)
    found = read_manifest(stores["adapter"]).model
    assert found.base == str(base) and found.revision == revision_of(model_of(adapter))


def test_the_revision_is_of_both(adapter, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "base")
    change(adapter / "adapter_config.json", base_model_name_or_path=str(copy))
    before = revision_of(model_of(adapter))
    own, of_base = before.split("+")
    assert own.startswith("sha256:") and of_base == revision_of(model_of(copy)) == revision_here(model_of(copy))
    small_model("Llama", seed=5).save_pretrained(copy)
    assert revision_of(model_of(adapter)).split("+")[0] == own and revision_of(model_of(adapter)) != before
    save_adapter(copy, adapter, seed=2)
    assert revision_of(model_of(adapter)).split("+")[0] != own
    assert at_revision(model_of(adapter), before) == model_of(adapter)


def test_where_the_base_is(adapter, base, tmp_path, monkeypatch):
    """A path is relative to the adapter's folder or to the current one; if both exist, it is refused."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "models" / "base")
    change(adapter / "adapter_config.json", base_model_name_or_path="models/base")
    load_model(model_of(adapter), [Site(1)], CPU)
    change(adapter / "adapter_config.json", base_model_name_or_path="../models/base")
    load_model(model_of(adapter), [Site(1)], CPU)
    change(adapter / "adapter_config.json", base_model_name_or_path="models/base")
    shutil.copytree(base, adapter / "models" / "base")
    assert "write the full path there" in refusal(lambda model: load_model(model, [Site(1)], CPU), model_of(adapter))


def test_the_tokenizer_is_its_own_or_its_base_s(adapter, base):
    assert load_tokenizer(model_of(adapter)).hash() == load_tokenizer(model_of(base)).hash()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(adapter)
    assert load_tokenizer(model_of(adapter)).hash() != load_tokenizer(model_of(base)).hash()
    (adapter / "tokenizer.json").write_text("{")
    assert "tokenizer.json is damaged" in refusal(load_tokenizer, model_of(adapter))


@pytest.mark.parametrize(("kind", "config"), {
    "DoRA": peft.LoraConfig(**LORA, use_dora=True),
    "IA3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"],
                          feedforward_modules=["down_proj"]),
    "embedding": peft.LoraConfig(**LORA | {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "tokens": peft.LoraConfig(**LORA, trainable_token_indices=[5, 7]),
}.items())
def test_other_sorts_that_can_be_merged(base, tmp_path, kind, config):
    folder = save_adapter(base, tmp_path / "adapter", config)
    merged = merged_by_hand(folder, tmp_path / "merged")
    with torch.no_grad():
        wanted = transformers.AutoModelForCausalLM.from_pretrained(merged)(IDS).logits
        assert torch.equal(load_causal_lm(model_of(folder), CPU).module(IDS).logits, wanted)


def test_more_vocabulary(base, tmp_path):
    """PEFT saves the embedding of a base that was resized: all rows come from the adapter."""
    folder = save_adapter(base, tmp_path / "adapter", tokens=4100)
    assert config_at_hand(model_of(folder)).vocab_size == 4096
    found = load_causal_lm(model_of(folder), CPU)
    assert found.vocabulary == 4100 == load_model(model_of(folder), [Site(0)], CPU).vocabulary
    causal = transformers.AutoModelForCausalLM.from_pretrained(base)
    causal.resize_token_embeddings(4100)
    wanted = peft.PeftModel.from_pretrained(causal, folder).merge_and_unload()
    with torch.no_grad():
        assert torch.equal(found.module(IDS).logits, wanted(IDS).logits)
    without = save_adapter(base, tmp_path / "without", peft.LoraConfig(**LORA | {"target_modules": ["embed_tokens"]}),
                           tokens=4100, save_embedding_layers=False)
    assert "it was trained with 4100 tokens, its base has 4096, and it does not have the rows" in refusal(
        lambda model: load_causal_lm(model, CPU), model_of(without))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<|more {number}|>" for number in range(4)])
    plain = save_adapter(base, tmp_path / "plain")
    tokenizer.save_pretrained(plain)
    assert "but the model's embedding has only 4096 rows" in refusal(lambda model: load_model(model, [Site(1)], CPU),
                                                                      model_of(plain))


def test_an_adapter_of_one_end_of_a_tied_matrix_is_refused(tmp_path):
    """Merged into the embedding, it would change the head as well."""
    base = save_small_model("Gemma3", tmp_path / "base")
    assert transformers.AutoConfig.from_pretrained(base).tie_word_embeddings
    folder = save_adapter(base, tmp_path / "adapter", peft.LoraConfig(**LORA | {"target_modules": ["embed_tokens"]}))
    assert "computes something else than unmerged" in refusal(lambda model: load_causal_lm(model, CPU),
                                                               model_of(folder))


LOADERS = {"collect": lambda model: load_model(model, [Site(1)], CPU),
           "evaluate": lambda model: load_causal_lm(model, CPU),
           "index": lambda model: load_unembedding(model, CPU)}


def whole_too(folder):
    small_model("Llama").save_pretrained(folder)


REFUSED = {
    "cut off": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()[:-10]), "adapter_model.safetensors is cut off"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
                   "has no adapter_model.safetensors"),
    "damaged": (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json is damaged"),
    "nameless": (lambda folder: change(folder / "adapter_config.json", base_model_name_or_path=None),
                 "does not say which model it is an adapter of"),
    "newer": (lambda folder: change(folder / "adapter_config.json", peft_type="NEWEST"), "update peft"),
    "Megatron": (lambda folder: change(folder / "adapter_config.json", megatron_config={"a": 1}), "Megatron"),
    "another rank": (lambda folder: change(folder / "adapter_config.json", r=8), "it does not fit its base"),
    "whole too": (whole_too, "holds both a whole model (config.json, model.safetensors) and an adapter"),
    "no base": (lambda folder: change(folder / "adapter_config.json", base_model_name_or_path="/no/such/base"),
                "is an adapter of /no/such/base (base_model_name_or_path in its adapter_config.json): cannot load "
                "model '/no/such/base': there is no such folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_adapters(adapter, case):
    damage, message = REFUSED[case]
    damage(adapter)
    for load in LOADERS.values():
        assert message in refusal(load, model_of(adapter))


def test_adapters_that_do_not_fit(base, adapter, tmp_path):
    """An adapter of a deeper base is refused; PEFT itself ignores weights that have no place."""
    deeper = small_model("Llama").config
    deeper.num_hidden_layers, deeper.layer_types = 6, None
    transformers.AutoModelForCausalLM.from_config(deeper).save_pretrained(tmp_path / "deeper")
    folder = save_adapter(tmp_path / "deeper", tmp_path / "other")
    change(folder / "adapter_config.json", base_model_name_or_path=str(base))
    assert "it has no place in its base for" in refusal(LOADERS["evaluate"], model_of(folder))
    change(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "deeper"))
    assert "it does not fit its base: it lacks" in refusal(LOADERS["evaluate"], model_of(adapter))


def test_bases_that_cannot_be_had(base, adapter, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    change(adapter / "adapter_config.json", base_model_name_or_path=str(broken))
    (broken / "model.safetensors").write_bytes(b"")
    for load in LOADERS.values():
        found = refusal(load, model_of(adapter))
        assert found.startswith(f"{adapter} is an adapter of {broken} ") and "is cut off in its header" in found
    (broken / "config.json").write_text("{")
    for load in (read_config, *LOADERS.values()):
        assert f"{adapter} is an adapter of {broken} " in refusal(load, model_of(adapter))
    change(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    for load in (read_config, *LOADERS.values()):
        assert "is itself an adapter: merge it first" in refusal(load, model_of(adapter))


@pytest.mark.parametrize("config", [
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)])
def test_prompts_are_no_weights(base, tmp_path, config):
    folder = save_adapter(base, tmp_path / "adapter", config)
    for load in LOADERS.values():
        assert "cannot be merged into its base" in refusal(load, model_of(folder))


def test_without_peft(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for load in (read_config, config_at_hand, load_tokenizer, *LOADERS.values()):
        found = refusal(load, model_of(adapter))
        assert "it is an adapter of" in found and "install peft (`pip install peft`)" in found


LOAD = """
import sys, torch
from olmoscope.errors import UserError
from olmoscope.model.load import load_model
from olmoscope.model.splice import load_causal_lm
from olmoscope.model_source import at_revision, pinned, revision_of
from olmoscope.recipe.schema import Model
from olmoscope.site import Site
from olmoscope.tokens.tokenizer import load_tokenizer

cpu = torch.device("cpu")
for name in sys.argv[1:]:
    name, _, revision = name.partition("@")
    model = at_revision(Model(name=name, dtype="float32"), revision)
    try:
        torch.manual_seed(0)
        loaded = load_causal_lm(model, cpu)
        with torch.no_grad():
            logits = loaded.module(torch.arange(24)[None] * 31).logits
        assert loaded.revision == revision_of(pinned(model)) == load_model(model, [Site(1)], cpu).revision
        print(loaded.revision, load_tokenizer(model).hash(), float(logits.double().square().sum()))
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_adapters_of_the_hub(hub_endpoint, base, adapter, tmp_path):
    """Both commits are recorded, and a store's commits are found again after both repositories have moved."""
    other = tmp_path / "other"
    small_model("Llama", seed=5).save_pretrained(other)
    merged = merged_by_hand(adapter, tmp_path / "merged")
    with torch.no_grad():
        wanted = float(transformers.AutoModelForCausalLM.from_pretrained(merged)(IDS).logits.double().square().sum())
    change(adapter / "adapter_config.json", base_model_name_or_path="some/base")
    config_too = Path(shutil.copytree(adapter, tmp_path / "config-too"))
    shutil.copy(base / "config.json", config_too)
    gated = Path(shutil.copytree(adapter, tmp_path / "of-gated"))
    change(gated / "adapter_config.json", base_model_name_or_path="some/gated")
    both = Path(shutil.copytree(config_too, tmp_path / "both"))
    shutil.copy(base / "model.safetensors", both)
    for name, folder in (("base", base), ("gated", base), ("adapter", adapter), ("config-too", config_too),
                         ("of-gated", gated), ("both", both)):
        hub_endpoint.add("model", f"some/{name}", folder)
    hub_endpoint.close("model", "some/gated", "gated")

    def ask(*names, cache="hf", **more):
        done = run_forked(*names, environment=hub_endpoint.environment(tmp_path / cache) | more, hub=True, code=LOAD)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    first, second, third, fourth = ask("some/adapter", "some/config-too", "some/of-gated", "some/both")
    pair = f"{COMMIT}+{COMMIT}"
    assert first == second == f"{pair} {load_tokenizer(model_of(base)).hash()} {wanted}"
    assert third.startswith("some/of-gated is an adapter of some/gated ") and "it is gated" in third
    assert "holds both a whole model" in fourth
    assert ask("some/adapter", HF_HUB_OFFLINE="1") == [first]
    hub_endpoint.add("model", "some/base", other, commit=NEXT)
    save_tokenizer(other)
    moved, kept = ask("some/adapter", f"some/adapter@{pair}")
    assert moved.split()[0] == f"{COMMIT}+{NEXT}" and moved.split()[2] != first.split()[2] and kept == first
    assert ask(f"some/adapter@{pair}", cache="new") == [first]
    change(adapter / "adapter_config.json", revision=COMMIT)  # the base's revision, as PEFT records it
    assert ask("some/adapter", cache="newer") == [first]
    local = ask(str(adapter), f"{adapter}@+{NEXT}")  # a local adapter of a base on the hub
    assert [line.split()[0].split("+")[1] for line in local] == [COMMIT, NEXT]


@pytest.mark.slow
def test_every_stage_with_an_adapter(adapter, base, tmp_path):
    """Collected, trained, measured, indexed, prompted and released: always the merged model, and both revisions."""
    write_documents(tmp_path / "corpus", count=40)
    job = recipe(tmp_path / "corpus", model__name=str(adapter), activations__layers=[1], tokens__count=1200,
                 tokens__held_out=300, saes=[{"layer": 1, "d_sae": 64, "k": 4}])
    out = tmp_path / "out"
    revision = revision_of(model_of(adapter))
    collect_stores(job, out)
    assert all(fresh for _, fresh in train_saes(job, out, []))
    assert all(fresh for _, fresh in evaluate_saes(job, out, []))
    assert not any(fresh for _, fresh in evaluate_saes(job, out, []))
    run = run_folder(out, job.saes[0])
    evaluated = json.loads((run / "evaluation.json").read_text())
    assert evaluated["model_revision"] == revision
    assert verify_stores(out)[0].problems == []
    (anywhere,) = evaluate_anywhere([str(run)], Options(tmp_path / "other", str(out), 200, None, "float32", None, 512,
                                                        None))
    assert read_evaluation(anywhere.folder / EVALUATION).model_revision == revision
    index_sae(str(run), device="cpu")
    (shown,) = open_collection(run / "index", None).values()
    assert len(shown.live.tokens("import json")) > 0
    build_release(out)
    card = (out / "release" / "README.md").read_text()
    example = card.partition("```python\n")[2].partition("```")[0]
    compile(example, "card", "exec")
    assert f"base = AutoModelForCausalLM.from_pretrained({str(base)!r}, dtype" in example
    assert "PeftModel.from_pretrained(base, name).merge_and_unload()" in example
    small = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        small.model.layers[0].mlp.up_proj.weight.mul_(2)
    small.save_pretrained(tmp_path / "changed")
    change(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "changed"))
    with pytest.raises(UserError, match="have changed since"):
        index_sae(str(run), out=tmp_path / "again", device="cpu")
