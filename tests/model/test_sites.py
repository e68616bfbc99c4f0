"""Sites inside layers are read where each architecture's code has them, and TransformerLens reads the same values.

Shapes: B sequences, T positions, D width of a site.
"""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import save_tokenizer
from olmoscope.errors import UserError
from olmoscope.model.capture import captured, read_sites, replaced
from olmoscope.model.describe import describe_model
from olmoscope.model.load import load_model
from olmoscope.model.splice import load_causal_lm
from olmoscope.recipe.schema import Model
from olmoscope.site import EMBED, PARTS, Site
from site_models import (
    DTYPES,
    FAMILIES,
    PATHS,
    TOKENS_BT,
    D,
    by_hand,
    causal_lm,
    close,
    hooks,
    logits_of,
    noise,
    parts_of,
    places_of,
)

CPU = torch.device("cpu")


@DTYPES
@FAMILIES
def test_sites_are_what_hooks_by_hand_see(family, dtype):
    model, parts = causal_lm(family, dtype), parts_of(family)
    for layer in (0, 2):
        wanted = by_hand(family, model, layer)
        places = places_of(model, layer, parts)
        found = read_sites(model.body, places, TOKENS_BT)
        for place in places:
            part = place.site.part
            assert torch.equal(found[place.site], wanted[part]), part
            assert model.find([place.site]).widths[place.site] == wanted[part].shape[-1]
    assert hooks(model) == 0


@DTYPES
@FAMILIES
def test_a_layer_is_the_sum_of_its_sites(family, dtype):
    model, mid = causal_lm(family, dtype), PATHS[family].mid_reader is not None
    parts = ["attn.out", "mid", "mlp.out", ""] if mid else ["attn.out", "mlp.out", ""]
    wanted = [Site(layer, part) for layer in range(4) for part in parts]
    sites = model.find([EMBED, *wanted])
    assert sites.parallel is not mid
    at = read_sites(model.body, list(sites.places.values()), TOKENS_BT)
    for layer in range(4):
        before = at[Site(layer - 1)] if layer else at[EMBED]
        attn, mlp = at[Site(layer, "attn.out")], at[Site(layer, "mlp.out")]
        if mid:
            close(before + attn, at[Site(layer, "mid")], dtype)
            close(at[Site(layer, "mid")] + mlp, at[Site(layer)], dtype)
        else:
            close(before + attn + mlp, at[Site(layer)], dtype)


@FAMILIES
def test_the_projection_makes_attention_of_z(family):
    model, paths = causal_lm(family), PATHS[family]
    z, out = places_of(model, 1, ["attn.z", "attn.out"])
    at = read_sites(model.body, [z, out], TOKENS_BT)
    projection = model.layers[1].get_submodule(paths.projection)
    W = projection.weight.detach() if family == "gpt2" else projection.weight.detach().T
    attention_BTD = at[z.site] @ W
    if projection.bias is not None:
        attention_BTD = attention_BTD + projection.bias.detach()
    if paths.attention_added not in (paths.attention, paths.projection):
        with torch.no_grad():
            attention_BTD = model.layers[1].get_submodule(paths.attention_added)(attention_BTD)
    torch.testing.assert_close(paths.scale * attention_BTD, at[out.site], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama4_text", "opt", "dbrx", "lfm2_moe"])
def test_layers_of_other_forms(family):
    """Rows in one list (Llama 4, OPT), an MLP that is not a module (OPT), attention inside a module (DBRX), a
    convolution in its place (LFM2): the sums hold, and a change at a site moves the stream by the same amount."""
    model = causal_lm(family)
    for layer in range(4):
        places = {place.site.part: place for place in places_of(model, layer, PARTS)}
        at = read_sites(model.body, list(places.values()), TOKENS_BT)
        close(at[Site(layer, "mid")] + at[Site(layer, "mlp.out")], at[Site(layer)])
        assert all(rows.shape[:2] == TOKENS_BT.shape for rows in at.values())
        d_BTD = noise(at[Site(layer)])
        for part, below in (("attn.out", "mid"), ("mlp.out", "")):
            with captured([places[below]]) as moved, replaced(places[part], lambda x, d_BTD=d_BTD: x + d_BTD):
                logits_of(model)
            torch.testing.assert_close(moved[Site(layer, below)] - at[Site(layer, below)], d_BTD, rtol=1e-3, atol=1e-4)
        wanted = logits_of(model)
        for place in places.values():
            with replaced(place, torch.clone):
                assert torch.equal(logits_of(model), wanted), place.site
    assert hooks(model) == 0


def test_two_modules_in_place_of_the_mlp_leave_the_sites_of_attention():
    model = causal_lm("granitemoeshared")
    out, mid = places_of(model, 1, ["attn.out", "mid"])
    at = read_sites(model.body, [*places_of(model, 0, [""]), out, mid], TOKENS_BT)
    close(at[Site(0)] + at[out.site], at[mid.site])


def test_residual_streams_alone_need_no_pass():
    model = causal_lm("llama")
    passes = []
    handle = model.body.register_forward_pre_hook(lambda *arguments: passes.append(1))
    model.find([EMBED, Site(0), Site(3)])
    assert not passes
    model.find([Site(layer, part) for layer in range(4) for part in PARTS])
    handle.remove()
    assert len(passes) == 1


BRIDGED = ["gpt2", "llama", "olmo2", "olmo3", "gemma2", "gemma3_text", "gpt_neox", "qwen3", "mixtral", "phi3",
           "granite"]


@pytest.mark.parametrize("family", BRIDGED)
def test_transformer_lens_sees_the_same_under_our_names(family):
    """Its bridge runs the same weights and, like us, reads what is added to the stream after post-norms and scales."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = causal_lm.__wrapped__(family)  # the bridge takes the module to pieces
    sites = model.find([EMBED, *(Site(1, part) for part in parts_of(family))])
    found = read_sites(model.body, list(sites.places.values()), TOKENS_BT)
    model.module.config._attn_implementation = "eager"
    bridge = build_bridge_from_module(model.module, type(model.module).__name__, hf_config=model.module.config)
    _, cache = bridge.run_with_cache(TOKENS_BT)
    for site, x_BTD in found.items():
        theirs = cache[site.transformer_lens]
        theirs = theirs.flatten(2) if site.part == "attn.z" else theirs
        torch.testing.assert_close(theirs, x_BTD, rtol=1e-3, atol=1e-4, msg=lambda text, site=site: f"{site}: {text}")


def test_the_older_class_of_transformer_lens_has_our_names_but_those_of_inputs():
    """`HookedTransformer`, with the weights of a GPT-2."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    model = causal_lm("gpt2")
    config = model.module.config
    theirs = HookedTransformer(HookedTransformerConfig(
        n_layers=4, d_model=D, n_ctx=config.n_positions, n_heads=config.n_head, d_head=D // config.n_head,
        d_mlp=config.n_inner, d_vocab=config.vocab_size, act_fn="gelu_new", normalization_type="LN",
        eps=config.layer_norm_epsilon, original_architecture="GPT2LMHeadModel", device="cpu"))
    theirs.load_state_dict(convert_gpt2_weights(model.module, theirs.cfg), strict=False)
    _, cache = theirs.run_with_cache(TOKENS_BT)
    found = read_sites(model.body, places_of(model, 2, PARTS), TOKENS_BT)
    for site, x_BTD in found.items():
        if site.part in ("attn.in", "mlp.in"):
            assert site.transformer_lens not in cache
            continue
        y = cache[site.transformer_lens]
        torch.testing.assert_close(y.flatten(2), x_BTD, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_script_of_all_families_finds_nothing_wrong():
    done = subprocess.run([sys.executable, Path(__file__).parents[2] / "benchmarks" / "sites.py", "--only",
                           "gpt_neox,gemma4_text,lfm3,zaya,reformer"], capture_output=True,
                          text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong" in done.stdout and "lfm3: right" in done.stdout and "zaya: refused" in done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    def save(family):
        folder = tmp_path_factory.mktemp(family)
        causal_lm(family).module.save_pretrained(folder)
        save_tokenizer(folder)
        return Model(name=str(folder), dtype="float32")

    return functools.cache(save)


@pytest.mark.parametrize(("family", "line"), [
    ("olmo3", "attn.in, attn.z, attn.out, mid, mlp.in, mlp.out"),
    ("gpt_neox", "attn.in, attn.z, attn.out, mlp.in, mlp.out; no mid: attention and MLP are added at once"),
    ("granitemoeshared", "attn.in, attn.z, attn.out, mid"),
    ("bert", "no: cannot tell which module of layer 0 of MODEL is its mlp")])
def test_the_screen_of_a_model_says_which_sites_it_has(family, line, folders):
    model = folders(family)
    said = dict(describe_model(model, CPU).works)["sites inside a layer"].replace(model.name, "MODEL")
    assert said.startswith(line) and "\n" not in said
    assert said == line or line.startswith("no")


def test_models_are_loaded_with_their_sites(folders):
    model, wanted = folders("olmo3"), [Site(1, "mlp.out"), Site(0), Site(2, "attn.z")]
    cut, whole = load_model(model, wanted, CPU), load_causal_lm(model, CPU, wanted)
    assert len(cut.layers) == 3 and set(cut.sites.places) == set(wanted)
    found = read_sites(cut.module, list(cut.sites.places.values()), TOKENS_BT)
    for site in wanted:
        torch.testing.assert_close(found[site], by_hand("olmo3", whole, site.layer)[site.part])
    with pytest.raises(UserError, match=r"has no layers\.1\.mid: its layers add"):
        load_model(folders("gpt_neox"), [Site(1, "mid")], CPU)
    with pytest.raises(UserError, match=r"model\.compile: whole layers are compiled, and layers\.1\.mlp\.out is"):
        load_model(model.model_copy(update={"compile": True}), wanted, CPU)
