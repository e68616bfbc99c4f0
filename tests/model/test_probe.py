"""Assumptions about a model are tested on it: causal, rows from every layer, documents apart or not."""

import pytest
import torch
import transformers
from typer.testing import CliRunner

from helpers import ARCHITECTURES, recipe, save_small_model, save_tokenizer, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.cli.app import app
from olmoscope.errors import UserError
from olmoscope.model.load import load_model
from olmoscope.model.outputs import hidden_of, with_hidden, without_tensors
from olmoscope.model.probe import probe
from olmoscope.recipe.schema import Model
from olmoscope.site import Site

CPU = torch.device("cpu")
LEAKING = {
    "OPT": transformers.OPTConfig(vocab_size=128, hidden_size=32, num_hidden_layers=3, ffn_dim=48,
                                  word_embed_proj_dim=32, num_attention_heads=4),
    "BLOOM": transformers.BloomConfig(vocab_size=128, hidden_size=32, n_layer=3, n_head=4),
    "Mamba": transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=3, state_size=8)}


def save(config, folder):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Model(name=str(folder), dtype="float32")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_architectures_that_keep_documents_apart(architecture, dtype, tmp_path):
    save_small_model(architecture, tmp_path)
    assert load_model(Model(name=str(tmp_path), dtype=dtype), [Site(2)], CPU).probe.documents_apart


@pytest.mark.parametrize("name", LEAKING)
def test_documents_that_see_each_other_are_noticed(name, tmp_path):
    found = load_model(save(LEAKING[name], tmp_path), [Site(1)], CPU).probe
    assert not found.documents_apart
    found.refuse_leak(name, "share")
    with pytest.raises(UserError, match=rf"tokens\.documents: apart does not work with {name}: .* set tokens\.doc"):
        found.refuse_leak(name, "apart")


def test_a_model_that_is_not_causal_is_refused(tmp_path):
    config = transformers.BertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=3, intermediate_size=48,
                                     num_attention_heads=4)
    with pytest.raises(UserError, match="is not causal: a row depends on the tokens after it"):
        load_model(save(config, tmp_path), [Site(1)], CPU)


class Decoder(torch.nn.Module):
    """A minimal decoder."""

    def __init__(self, last):
        super().__init__()
        self.embedding, self.layers = torch.nn.Embedding(64, 8), torch.nn.ModuleList([torch.nn.Identity(), last])

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache):
        x_BTD = self.embedding(input_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return x_BTD


def test_layers_of_another_width_or_form_are_refused():
    wide, streams = torch.nn.Linear(8, 12), torch.nn.Unflatten(2, (2, 4))
    for last, line in ((wide, r"gives \[2, 24, 12\], not rows of width 8"),
                       (streams, r"gives a tensor \[2, 24, 2, 4\]")):
        decoder = Decoder(last)
        with pytest.raises(UserError, match=line):
            probe(decoder, decoder.layers, "x", 8, 64, 24)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: (x,), lambda x: (x, None, torch.ones(1)),
                                  lambda x: [x, "more"]])
def test_forms_of_a_layers_output(make):
    x_BTD, other_BTD = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    output = make(x_BTD)
    assert hidden_of(output) is x_BTD
    replaced = with_hidden(output, other_BTD)
    assert type(replaced) is type(output) and hidden_of(replaced) is other_BTD
    if not isinstance(output, torch.Tensor):
        assert replaced[1:] == output[1:]
        assert [entry for entry in without_tensors(output) if isinstance(entry, torch.Tensor)] == []
    assert hidden_of(with_hidden(without_tensors(output), other_BTD)) is other_BTD


def test_an_output_without_rows():
    for output in (None, (), (None, torch.ones(1)), {"x": torch.ones(1, 2, 3)}, torch.ones(2, 3)):
        with pytest.raises(UserError, match=r"a decoder layer of this model gives .* cannot read"):
            hidden_of(output)


def test_collect_refuses_before_anything_is_packed(tmp_path):
    write_documents(tmp_path / "corpus")
    save(LEAKING["OPT"], tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    job = recipe(tmp_path / "corpus", model__name=str(tmp_path / "model"), model__dtype="float32",
                 tokens__documents="apart", activations__layers=[1], saes=[{"layer": 1, "d_sae": 64, "k": 4}])
    with pytest.raises(UserError, match=r"tokens\.documents: apart does not work"):
        collect(job, "train", tmp_path / "store")
    assert not (tmp_path / "store" / "tokens").exists()


def test_the_screen_of_a_model(tmp_path):
    def screen(name):
        done = CliRunner().invoke(app, ["model", str(name)], env={"COLUMNS": "120"})
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    found = screen("tiny")
    for line in ("decoder layers 8, model.layers", "d_model 256", "attention heads 4, 2 for keys and values",
                 "positions 2,048, sliding window 128", "evaluate, browse yes", "tokens.documents: apart yes",
                 "promoted tokens of index yes"):
        assert line in found
    save(LEAKING["OPT"], tmp_path)
    save_tokenizer(tmp_path)
    assert "tokens.documents: apart no: documents see each other" in screen(tmp_path)
