"""The residual stream, read by hooks, on five architectures."""

import shutil

import pytest
import torch

from helpers import ARCHITECTURES, read_streams, save_small_model, small_model, streams
from olmoscope.errors import UserError
from olmoscope.model.capture import captured
from olmoscope.model.layers import find_layers
from olmoscope.model.load import load_model
from olmoscope.recipe.schema import Model
from olmoscope.site import Site

TOKENS_BT = torch.randint(2, 4096, (3, 60), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_hidden_states_of_every_layer_but_the_last(architecture):
    """The last of transformers' hidden_states is the state after the final norm: the layer-31 trap."""
    model = small_model(architecture)
    _, layers = find_layers(model, 4)
    with torch.no_grad():
        hidden = model(TOKENS_BT, output_hidden_states=True, use_cache=False).hidden_states
    outputs = read_streams(model, layers, [0, 1, 2, 3], TOKENS_BT)
    for layer in (0, 1, 2):
        torch.testing.assert_close(outputs[layer], hidden[layer + 1])
    assert (outputs[3] - hidden[4]).abs().max() > 0.1 * hidden[4].abs().max()
    norm = next(module for name, module in model.named_modules() if name.endswith((".norm", ".ln_f")))
    with torch.no_grad():
        torch.testing.assert_close(norm(outputs[3]), hidden[4])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_cut_above_a_layer_gives_the_same(architecture, tmp_path):
    whole = small_model(architecture)
    save_small_model(architecture, tmp_path)
    cut = load_model(Model(name=str(tmp_path), dtype="float32"), [Site(2)], torch.device("cpu"))
    assert len(cut.layers) == 3
    assert (cut.num_layers, cut.d_model, cut.architecture) == (4, 32, type(whole).__name__)
    assert whole.get_submodule(cut.layers_path) is find_layers(whole, 4)[1]
    assert not any("lm_head" in name for name, _ in cut.module.named_parameters())
    want = read_streams(whole, find_layers(whole, 4)[1], [0, 2], TOKENS_BT)
    got = read_streams(cut.module, cut.layers, [0, 2], TOKENS_BT)
    for layer in (0, 2):
        torch.testing.assert_close(got[layer], want[layer])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_documents_kept_apart_are_as_if_alone(architecture):
    model = small_model(architecture)
    _, layers = find_layers(model, 4)
    lengths = [25, 1, 34]
    positions_BT = torch.cat([torch.arange(length) for length in lengths]).expand(3, -1)
    packed = read_streams(model, layers, [3], TOKENS_BT, positions_BT)[3]
    shared = read_streams(model, layers, [3], TOKENS_BT)[3]
    start = 0
    for number, length in enumerate(lengths):
        part = slice(start, start + length)
        alone = read_streams(model, layers, [3], TOKENS_BT[:, part])[3]
        torch.testing.assert_close(packed[:, part], alone, rtol=1e-4, atol=1e-4)
        if number:
            assert (shared[:, part] - alone).abs().max() > 0.01, "the test would not see a leak"
        start += length


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_at_the_end_changes_nothing(architecture):
    model = small_model(architecture)
    _, layers = find_layers(model, 4)
    alone = read_streams(model, layers, [3], TOKENS_BT[:1, :37])[3]
    padded_BT = TOKENS_BT.clone()
    padded_BT[0, 37:] = 0
    torch.testing.assert_close(read_streams(model, layers, [3], padded_BT)[3][:1, :37], alone,
                               rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_implementations_agree(attention, tmp_path):
    save_small_model("Olmo3", tmp_path)
    outputs = []
    for name in ("sdpa", attention):
        model = load_model(Model(name=str(tmp_path), dtype="float32", attention=name), [Site(0)], torch.device("cpu"))
        assert model.module.config._attn_implementation == name
        outputs.append(read_streams(model.module, model.layers, [0], TOKENS_BT)[0])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU may have flash attention")
def test_attention_that_is_not_to_be_had_is_named(tmp_path):
    save_small_model("Olmo3", tmp_path)
    with pytest.raises(UserError, match=r"model\.attention: flash_attention_2 does not work for .*test_att"):
        load_model(Model(name=str(tmp_path), attention="flash_attention_2"), [Site(3)], torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_compiled_layers_give_the_same_and_stop_where_they_should(tmp_path):
    """Hooks stay outside the compiled code; batches of other shapes, and documents apart, need no new compilation."""
    save_small_model("Olmo3", tmp_path)
    plain, compiled = (load_model(Model(name=str(tmp_path), dtype="float32", compile=flag), [Site(0), Site(2)],
                                   torch.device("cpu")) for flag in (False, True))
    positions_BT = torch.cat([torch.arange(25), torch.arange(35)]).expand(3, -1)
    for tokens_BT, positions in ((TOKENS_BT, None), (TOKENS_BT[:2, :41], None), (TOKENS_BT, positions_BT)):
        want, got = (read_streams(model.module, model.layers, [0, 2], tokens_BT, positions)
                     for model in (plain, compiled))
        for layer in (0, 2):
            torch.testing.assert_close(got[layer], want[layer], rtol=1e-4, atol=1e-4)


def test_nothing_runs_above_the_deepest_layer():
    model = small_model("Olmo3")
    _, layers = find_layers(model, 4)
    ran = []
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, arguments, number=number: ran.append(number))
    read_streams(model, layers, [0, 1], TOKENS_BT)
    assert ran == [0, 1]


def test_hooks_are_gone_afterwards():
    model = small_model("Llama")
    _, layers = find_layers(model, 4)
    with captured(streams(layers, [0, 3])):
        assert len(layers[3]._forward_hooks) == 1
    read_streams(model, layers, [3], TOKENS_BT)
    assert not any(layer._forward_hooks for layer in layers)


def test_layers_that_cannot_be_told():
    twice = torch.nn.ModuleDict({"a": torch.nn.ModuleList([torch.nn.Linear(1, 1)] * 4),
                                 "b": torch.nn.ModuleList([torch.nn.Linear(1, 1)] * 4)})
    with pytest.raises(UserError, match="lists of that length: a, b"):
        find_layers(twice, 4)
    with pytest.raises(UserError, match="lists of that length: none"):
        find_layers(torch.nn.Linear(1, 1), 4)


def test_wrong_models_are_refused(tmp_path):
    save_small_model("Llama", tmp_path / "llama")
    folder = str(tmp_path / "llama")
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="layer 4 is out of range"):
        load_model(Model(name=folder), [Site(4)], cpu)
    with pytest.raises(UserError, match=r"model.d_model: the recipe says 64, .* has 32"):
        load_model(Model(name=folder, d_model=64), [Site(1)], cpu)
    with pytest.raises(UserError, match=r"model.num_layers: the recipe says 8, .* has 4"):
        load_model(Model(name=folder, num_layers=8), [Site(1)], cpu)
    with pytest.raises(UserError, match="cannot load model"):
        load_model(Model(name=str(tmp_path / "nothing" / "here")), [Site(1)], cpu)
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(UserError, match="lacks weights"):
        load_model(Model(name=folder), [Site(1)], cpu)
