"""A model, tokenizer or SAE that cannot be loaded: one line that says the true cause, and never blames the network."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

from helpers import save_small_model
from olmoscope.errors import UserError
from olmoscope.model.config import config_at_hand, read_config
from olmoscope.model.load import load_model
from olmoscope.model.splice import load_causal_lm
from olmoscope.model.unembed import load_unembedding
from olmoscope.model_errors import POINTER
from olmoscope.recipe.schema import Model
from olmoscope.site import Site
from olmoscope.tokens.tokenizer import load_tokenizer

CPU = torch.device("cpu")
LOADERS = {"collect": lambda model: load_model(model, [Site(1)], CPU),
           "evaluate": lambda model: load_causal_lm(model, CPU),
           "index": lambda model: load_unembedding(model, CPU)}
LFS = POINTER + b"v1\noid sha256:" + b"4" * 64 + b"\nsize 14000000000\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_small_model("Llama", tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole, tmp_path):
    """A model's folder, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def reason(load, name, **settings):
    with pytest.raises(UserError) as caught:
        load(Model(name=str(name), dtype="float32", **settings))
    text = str(caught.value)
    assert "\n" not in text and "network" not in text and "connection" not in text, text
    return text


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def put(change_content):
    return lambda path: path.write_bytes(change_content(path.read_bytes()))


cut = put(lambda content: content[:-1000])


DAMAGES = {
    "cut": (cut, "model.safetensors is cut off: it has "),
    "cut in its header": (put(lambda content: content[:100]), "is cut off in its header, after 100"),
    "empty": (put(lambda _: b""), "is cut off in its header, after 0 bytes"),
    "longer": (put(lambda content: content + b"0"), "but its header says"),
    "a page": (put(lambda _: b"<!DOCTYPE html><html>"), "is not a safetensors file (it begins with b'<!DOCTYP"),
    "a broken header": (put(lambda content: content.replace(b'"data_offsets"', b'"data_offset!"', 1)),
                        "is damaged (its header cannot be read)"),
    "a pointer": (put(lambda _: LFS), "model.safetensors is a git-LFS pointer, not the file itself"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_weights(folder, case):
    damage, message = DAMAGES[case]
    damage(folder / "model.safetensors")
    for load in LOADERS.values():
        assert message in reason(load, folder)


def test_weights_in_parts(folder):
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink()
    part = sorted(folder.glob("model-*.safetensors"))[1]
    load = LOADERS["evaluate"]
    load(Model(name=str(folder), dtype="float32"))
    content = part.read_bytes()
    part.write_bytes(content[:-100])
    assert f"{part.name} is cut off" in reason(load, folder)
    part.unlink()
    assert f"lacks {part.name}, one of" in reason(load, folder)
    part.write_bytes(content)
    (folder / "model.safetensors.index.json").write_bytes(LFS)
    assert "model.safetensors.index.json is a git-LFS pointer" in reason(load, folder)


def test_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has its weights as pytorch_model.bin; only safetensors files are read" in reason(LOADERS["collect"], folder)
    (folder / "pytorch_model.bin").unlink()
    assert "has no weights as safetensors (model.safetensors)" in reason(LOADERS["collect"], folder)


CONFIGS = {
    "quantised": ({"quantization_config": {"quant_method": "aqlm"}},
                  "its weights are quantised (aqlm), which needs a package that is not installed: "),
    "remote code": ({"model_type": "my_own", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}},
                    "it needs its own code (auto_map in config.json), and downloaded code is never run"),
    "newer": ({"model_type": "my_own"}, "does not know its architecture (model_type 'my_own'): update transformers"),
    "nameless": ({"model_type": None}, "does not name the model's architecture (model_type)"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(folder, case):
    values, message = CONFIGS[case]
    change(folder / "config.json", **values)
    (folder / "c.py").write_text("raise SystemExit('downloaded code was run')")
    (folder / "m.py").write_text("raise SystemExit('downloaded code was run')")
    for load in LOADERS.values():
        assert message in reason(load, folder)


def test_code_of_its_own_is_not_run_where_transformers_has_the_architecture(folder):
    change(folder / "config.json", auto_map={"AutoConfig": "c.C", "AutoModel": "m.M", "AutoModelForCausalLM": "m.M"})
    (folder / "c.py").write_text("raise SystemExit('downloaded code was run')")
    (folder / "m.py").write_text("raise SystemExit('downloaded code was run')")
    for load in LOADERS.values():
        load(Model(name=str(folder), dtype="float32"))


def test_no_language_model(tmp_path):
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    transformers.ViTModel(config).save_pretrained(tmp_path / "model")
    assert "it is not a causal language model (model_type 'vit')" in reason(LOADERS["evaluate"], tmp_path / "model")


@pytest.mark.parametrize(("content", "message"), [
    (b"{", "config.json is damaged (not JSON: "), (b"[]", "config.json is damaged: it does not hold a mapping"),
    (LFS, "config.json is a git-LFS pointer"), (b"\xff\xfe", "config.json is damaged (not JSON: ")])
def test_damaged_config(folder, content, message):
    (folder / "config.json").write_bytes(content)
    for load in (read_config, config_at_hand, load_tokenizer, *LOADERS.values()):
        assert message in reason(load, folder)


def test_folders_that_are_no_models(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for load in (load_tokenizer, *LOADERS.values()):
        shutil.rmtree(folder)
        folder.mkdir()
        assert f"{folder} has no config.json: a model is a folder with" in reason(load, folder)
        (folder / "model.gguf").touch()
        assert "holds GGUF files, which cannot be read" in reason(load, folder)
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
        found = reason(load, folder)
        assert "it is an adapter of someone/base (adapter_config.json), not a whole model: install peft (`pip" in found


def test_paths_are_not_asked_of_the_hub(folder, monkeypatch, tmp_path):
    """If they were, this would take a while, since nobody listens."""
    monkeypatch.chdir(tmp_path)
    for load in (load_tokenizer, config_at_hand, *LOADERS.values()):
        assert f"there is no such folder in {tmp_path}; give its full path" in reason(load, "./models/x")
        assert f"there is no such folder in {tmp_path}; give its full path" in reason(load, "some/models/x")
        assert "there is no such folder; give its full path" in reason(load, tmp_path / "nothing")
        assert "there is no such folder" in reason(load, "~/models")
        assert "it is a file; give the folder that it is in" in reason(load, "model/config.json")
        load(Model(name="./model", dtype="float32"))


TOKENIZERS = {
    "a pointer": (put(lambda _: LFS), "tokenizer.json is a git-LFS pointer"),
    "cut": (cut, "tokenizer.json is damaged (not JSON: "),
    "another structure": (lambda path: change(path, model={"type": "Newest"}),
                          "tokenizer.json is damaged, or made by a newer"),
    "missing": (lambda path: [each.unlink() for each in path.parent.glob("*token*")],
                "has no tokenizer (tokenizer.json)"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_damaged_tokenizers(folder, case):
    damage, message = TOKENIZERS[case]
    damage(folder / "tokenizer.json")
    found = reason(load_tokenizer, folder)
    assert found.startswith(f"cannot load the tokenizer of model {str(folder)!r}: ") and message in found
