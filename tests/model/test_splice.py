"""Continuing from a layer's output gives the whole model's result, bit for bit, and the model's own logits."""

import pytest
import torch
import transformers

from helpers import ARCHITECTURES, save_small_model, small_model, streams
from olmoscope.errors import UserError
from olmoscope.model.layers import find_layers
from olmoscope.model.splice import load_causal_lm
from olmoscope.recipe.schema import Model
from olmoscope.site import Site

LAYERS = 4


@pytest.fixture(scope="module")
def tokens_BT():
    return torch.randint(2, 4000, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request, tmp_path_factory):
    folder = save_small_model(request.param, tmp_path_factory.mktemp(request.param))
    last = Site(LAYERS - 1)
    return request.param, load_causal_lm(Model(name=str(folder), dtype="float32"), torch.device("cpu"), [last])


def test_going_on_from_the_layers_own_output_changes_nothing(loaded, tokens_BT):
    _, model = loaded
    places = streams(model.layers, range(LAYERS))
    reading = model.read(tokens_BT, None, places)
    for place in places:
        assert torch.equal(model.go_on(place, reading.at[place.site], reading), reading.hidden_BTD), place.site
    assert torch.equal(model.read(tokens_BT, None, []).hidden_BTD, reading.hidden_BTD)  # no hook remains


def test_going_on_equals_a_hook_in_the_whole_model(loaded, tokens_BT):
    """Against transformers' own forward with a forward hook that replaces the layer's output."""
    architecture, model = loaded
    whole = small_model(architecture)
    for layer in range(LAYERS):
        noise_BTD = torch.randn(*tokens_BT.shape, model.d_model, generator=torch.Generator().manual_seed(layer))
        layers = whole.transformer.h if architecture == "GPT2" else whole.model.layers
        handle = layers[layer].register_forward_hook(
            lambda module, inputs, output, new=noise_BTD: (new, *output[1:]) if isinstance(output, tuple) else new)
        with torch.no_grad():
            wanted = whole(input_ids=tokens_BT, use_cache=False).logits
        handle.remove()
        place, = streams(model.layers, [layer])
        hidden_BTD = model.go_on(place, noise_BTD, model.read(tokens_BT, None, [place]))
        found = torch.cat([model.logits(part) for part in hidden_BTD.flatten(0, 1).split(7)])
        torch.testing.assert_close(found, wanted.flatten(0, 1), rtol=1e-5, atol=1e-5)


OTHERS = {
    "OPT": transformers.OPTConfig(vocab_size=4096, hidden_size=32, num_hidden_layers=4, ffn_dim=48,
                                  word_embed_proj_dim=32, num_attention_heads=4),
    "GPT-J": transformers.GPTJConfig(vocab_size=4096, n_embd=32, n_layer=4, n_head=4, rotary_dim=8, n_positions=128),
    "GPT-Neo": transformers.GPTNeoConfig(vocab_size=4096, hidden_size=32, num_layers=4, num_heads=4, window_size=16,
                                         attention_types=[[["global", "local"], 2]], max_position_embeddings=128),
    "Falcon": transformers.FalconConfig(vocab_size=4096, hidden_size=32, num_hidden_layers=4, num_attention_heads=4),
    "BLOOM": transformers.BloomConfig(vocab_size=4096, hidden_size=32, n_layer=4, n_head=4),
    "MPT": transformers.MptConfig(vocab_size=4096, d_model=32, n_layers=4, n_heads=4),
    "CodeGen": transformers.CodeGenConfig(vocab_size=4096, n_embd=32, n_layer=4, n_head=4, rotary_dim=8),
    "GPT": transformers.OpenAIGPTConfig(vocab_size=4096, n_embd=32, n_layer=4, n_head=4),
    "Mamba": transformers.MambaConfig(vocab_size=4096, hidden_size=32, num_hidden_layers=4, state_size=8)}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_that_give_tuples_or_lists_and_heads_that_bypass_the_base_model(name, tmp_path, tokens_BT):
    """Against a hook in transformers' own forward."""
    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_config(OTHERS[name]).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.1)
    whole.save_pretrained(tmp_path)
    model = load_causal_lm(Model(name=str(tmp_path), dtype="float32"), torch.device("cpu"))
    _, layers = find_layers(whole, LAYERS)
    clean = whole(input_ids=tokens_BT, use_cache=False).logits
    for layer in range(LAYERS):
        noise_BTD = torch.randn(*tokens_BT.shape, 32, generator=torch.Generator().manual_seed(layer))
        handle = layers[layer].register_forward_hook(
            lambda module, inputs, output, new=noise_BTD: new if isinstance(output, torch.Tensor) else
            type(output)([new, *output[1:]]))
        wanted = whole(input_ids=tokens_BT, use_cache=False).logits
        handle.remove()
        place, = streams(model.layers, [layer])
        reading = model.read(tokens_BT, None, [place])
        found = model.logits(reading.hidden_BTD.flatten(0, 1))
        torch.testing.assert_close(found, clean.flatten(0, 1), rtol=1e-4, atol=1e-4)
        found = model.logits(model.go_on(place, noise_BTD, reading).flatten(0, 1))
        torch.testing.assert_close(found, wanted.flatten(0, 1), rtol=1e-4, atol=1e-4)
        assert (wanted - clean).abs().max() > 1e-3


def test_logits_are_capped_where_the_model_caps_them(tmp_path, tokens_BT):
    config = transformers.Gemma2Config(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                       num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                                       final_logit_softcapping=0.5, sliding_window=16)
    whole = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.3)
    whole.save_pretrained(tmp_path)
    model = load_causal_lm(Model(name=str(tmp_path), dtype="float32", attention="eager"), torch.device("cpu"))
    with torch.no_grad():
        wanted = whole(input_ids=tokens_BT, use_cache=False).logits
    found = model.logits(model.read(tokens_BT, None, []).hidden_BTD.flatten(0, 1))
    assert float(found.abs().max()) <= 0.5
    torch.testing.assert_close(found, wanted.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_documents_apart_stay_apart(loaded, tokens_BT):
    """With restarted positions, the second document's states are those of the document alone."""
    _, model = loaded
    positions_BT = torch.cat([torch.arange(10), torch.arange(14)]).expand(len(tokens_BT), -1)
    place, = streams(model.layers, [1])
    reading = model.read(tokens_BT, positions_BT, [place])
    alone = model.read(tokens_BT[:, 10:], torch.arange(14).expand(len(tokens_BT), -1), [place])
    torch.testing.assert_close(reading.hidden_BTD[:, 10:], alone.hidden_BTD, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.go_on(place, reading.at[place.site], reading), reading.hidden_BTD)


def test_a_model_without_its_head_is_refused(tmp_path):
    whole = small_model("Llama")
    whole.config.tie_word_embeddings = False
    whole.model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lacks weights"):
        load_causal_lm(Model(name=str(tmp_path), dtype="float32"), torch.device("cpu"))
