"""Sites that a model lacks are refused in one line, and a user can name modules that olmoscope does not know."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch

from olmoscope.errors import UserError
from olmoscope.model.capture import read_sites
from olmoscope.model.sites import find_sites
from olmoscope.site import PARTS, Site
from site_models import DTYPES, PARALLEL, TOKENS_BT, D, causal_lm, hooks, places_of


@pytest.mark.parametrize("family", PARALLEL)
def test_a_parallel_layer_has_no_mid(family):
    with pytest.raises(UserError, match=r"has no layers\.2\.mid: its layers add attention and MLP to the residual stre"
                                        r"am at once, so there is nothing between them"):
        causal_lm(family).find([Site(2, "mid")])


@pytest.mark.parametrize(("family", "site", "line"), [
    ("bert", "layers.1.mlp.out",
     "cannot tell which module of layer 1 of bert is its mlp (its modules: attention, intermediate, output); name it "
     "with --set model.modules.mlp=NAME, or use the residual stream, layers.1"),
    ("beam", "layers.1.attn.out",
     "beam: layer 1 is not the sum of its input, self_attn and mlp; only the residual stream can be read, layers.1"),
    ("trocr", "layers.1.mid",  # post-norm as in BERT: the stream continues as the norm of a sum, not as the sum
     "trocr: layer 1 is not the sum of its input, self_attn and fc1,fc2; only the residual stream can be read, "
     "layers.1"),
    ("inkling2_text", "layers.1.attn.out",  # the stream in between is not the input of any module
     "inkling2_text: layer 1 is not the sum of its input, self_attn and mlp; only the residual stream can be read, "
     "layers.1"),
    ("granitemoeshared", "layers.1.mlp.out",
     "granitemoeshared has no layers.1.mlp.out: block_sparse_moe of layer 1 does not give all that the layer adds "
     "after attention, so layers.1.mid + layers.1.mlp.out would not be layers.1"),
    ("jetmoe", "layers.1.attn.z",
     "jetmoe has no layers.1.attn.z: no matrix in self_attention of layer 1 gives what self_attention gives")])
def test_what_a_family_lacks_is_said_in_a_line(family, site, line):
    model = causal_lm(family)
    with pytest.raises(UserError) as caught:
        model.find([Site.parse(site)])
    assert str(caught.value) == line
    assert hooks(model) == 0


def renamed(family="llama", **names):
    """A model whose layers have other names for their modules, with a forward that uses them."""
    model = causal_lm.__wrapped__(family)
    for layer in model.layers:
        kept = OrderedDict((names.get(name, name), child) for name, child in layer._modules.items())
        layer._modules.clear()
        layer._modules.update(kept)
        layer.__class__ = type("Renamed", (type(layer),), {
            old: property(lambda self, new=new: self._modules[new]) for old, new in names.items()})
    return model


def test_unusual_names_are_named_by_the_user():
    usual, model = causal_lm("llama"), renamed(self_attn="attending", mlp="wide")
    with pytest.raises(UserError, match=r"cannot tell which module of layer 1 of llama is its attention \(its modules: "
                                        r"attending, wide, .*--set model\.modules\.attention=NAME"):
        model.find([Site(1, "mlp.out")])
    named = replace(model, modules={"attention": "attending", "mlp": "wide"})
    found = read_sites(named.body, places_of(named, 1, PARTS), TOKENS_BT)
    wanted = read_sites(usual.body, places_of(usual, 1, PARTS), TOKENS_BT)
    assert all(torch.equal(found[site], wanted[site]) for site in wanted)
    for wrong in ("attend", "attending,wider", "q_proj"):
        line = f"model.modules.attention: layer 1 of llama has no module '{wrong}'; it has attending, wide, "
        with pytest.raises(UserError, match=line):
            replace(model, modules={"attention": wrong}).find([Site(1, "mlp.out")])
    with pytest.raises(UserError, match="is not the sum of its input"):
        replace(model, modules={"attention": "input_layernorm", "mlp": "wide"}).find([Site(1, "mlp.out")])


@DTYPES
def test_a_part_that_adds_nothing_proves_nothing(dtype):
    """Any module that reads the stream before attention could be mistaken for one that reads it afterwards."""
    model = causal_lm.__wrapped__("llama", dtype)
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight.zero_()
    with pytest.raises(UserError, match="layer 1 is not the sum of its input"):
        model.find([Site(1, "mid")])
    assert model.find([Site(2, "mid")]).places


def test_an_mlp_that_is_no_module_is_named_by_its_first_and_last():
    model = causal_lm("opt")
    found, wanted = (one.find([Site(1, "mlp.in"), Site(1, "mlp.out")]).places.values()
                     for one in (replace(model, modules={"mlp": "fc1,fc2"}), model))
    assert list(found) == list(wanted)
    with pytest.raises(UserError, match="has no module 'fc1,'; it has self_attn, "):
        replace(model, modules={"mlp": "fc1,"}).find([Site(1, "mlp.in")])


def test_find_sites_needs_no_head_and_leaves_no_hook():
    model = causal_lm("llama")
    with pytest.raises(UserError, match="layer 1 of llama has no module 'nothing'"):
        find_sites(model.body, model.layers, [Site(1, "mid")], "llama", D, 4096, {"mlp": "nothing"})
    assert hooks(model) == 0
