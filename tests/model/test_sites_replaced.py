"""A site replaced by itself changes nothing, and other rows have the same effect as hooks written by hand.

Shapes: B sequences, T positions, D width of a site.
"""

from dataclasses import replace

import pytest
import torch

from olmoscope.features.steer import Continuation, Edit, pick, steering
from olmoscope.model.capture import captured, read_sites, replaced
from olmoscope.seeds import generator
from olmoscope.site import PARTS
from olmoscope.train.initialize import initialize
from site_models import (
    FAMILIES,
    PARALLEL,
    PATHS,
    SEQUENTIAL,
    TOKENS_BT,
    causal_lm,
    hooks,
    logits_of,
    noise,
    parts_of,
    places_of,
)

INNER = tuple(part for part in PARTS if part)


@FAMILIES
def test_replaced_by_itself_nothing_changes_and_by_zeros_logits_do(family):
    model = causal_lm(family)
    wanted = logits_of(model)
    for place in places_of(model, 1, parts_of(family)):
        for change in (lambda x: x, torch.clone):
            with replaced(place, change):
                assert torch.equal(logits_of(model), wanted), place.site
        with replaced(place, torch.zeros_like):
            assert not torch.equal(logits_of(model), wanted), place.site
    assert hooks(model) == 0 and torch.equal(logits_of(model), wanted)


def changed_by_hand(family, model, layer, part, new_BTD):
    """Logits with other rows at a site, by hooks of the test's own; `mid`: the rest of the layer, run by hand."""
    paths, block = PATHS[family], model.layers[layer]

    def put(module, arguments, settings):
        if arguments:
            return (new_BTD, *arguments[1:]), settings
        return arguments, {**settings, "hidden_states": new_BTD}

    def give(module, arguments, output):
        new = new_BTD / paths.scale if part in ("attn.out", "mlp.out") else new_BTD
        if part == "mid":
            new = new_BTD + paths.scale * rest_of(family, block, new_BTD)
        return new if isinstance(output, torch.Tensor) else type(output)([new, *output[1:]])

    inputs = {"attn.in": paths.attention, "attn.z": paths.projection, "mlp.in": paths.mlp}
    outputs = {"attn.out": paths.attention_added, "mlp.out": paths.mlp_added, "": "", "mid": ""}
    handle = (block.get_submodule(inputs[part]).register_forward_pre_hook(put, with_kwargs=True) if part in inputs
              else block.get_submodule(outputs[part]).register_forward_hook(give))
    logits = logits_of(model)
    handle.remove()
    return logits


def rest_of(family, block, mid_BTD):
    """What the MLP adds where the stream is `mid_BTD`."""
    order = {"olmo": ("mlp", "post_feedforward_layernorm"), "gemma": ("pre_feedforward_layernorm", "mlp",
             "post_feedforward_layernorm"), "gpt2": ("ln_2", "mlp")}
    kind = next((kind for kind in order if family.startswith(kind) and family != "olmoe"), None)
    rows = mid_BTD
    for name in order.get(kind, ("post_attention_layernorm", "mlp")):
        rows = block.get_submodule(name)(rows)
    return rows[0] if isinstance(rows, tuple) else rows


WITH_MID = [family for family in SEQUENTIAL if family != "bloom"]  # its MLP adds the stream itself


@pytest.mark.parametrize("family", [*WITH_MID, *PARALLEL])
def test_going_on_from_other_rows_equals_hooks_by_hand(family):
    model = causal_lm(family)
    places = places_of(model, 2, parts_of(family))
    for skips in {model.skips, False}:
        one = replace(model, skips=skips)
        reading = one.read(TOKENS_BT, None, places)
        for place in places:
            x_BTD = reading.at[place.site]
            kept = x_BTD.clone()
            same_BTD = one.go_on(place, x_BTD, reading)
            assert torch.equal(same_BTD, reading.hidden_BTD), place.site
            assert torch.equal(x_BTD, kept), "the model changed the rows that it was given"
            new_BTD = noise(x_BTD)
            wanted = changed_by_hand(family, model, 2, place.site.part, new_BTD)
            hidden_BTD = one.go_on(place, new_BTD, reading)
            found = one.logits(hidden_BTD.flatten(0, 1)).view_as(wanted)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(wanted, logits_of(model), atol=1e-3), place.site
    assert hooks(model) == 0


def test_hooks_are_gone_after_an_exception():
    for family in ("llama", "llama4_text", "granite", "gpt_neox"):
        model = causal_lm(family)

        def fail(x):
            raise ZeroDivisionError

        for place in places_of(model, 1, [part for part in PARTS if part != "mid" or family != "gpt_neox"]):
            with pytest.raises(ZeroDivisionError), captured([place]), replaced(place, fail):
                logits_of(model)
            with pytest.raises(IndexError):  # the pass itself fails
                read_sites(model.body, [place], TOKENS_BT + 10**6)
        assert hooks(model) == 0


@pytest.mark.parametrize("part", INNER)
@pytest.mark.parametrize("family", ["olmo3", "granite"])
def test_steering_inside_a_layer_goes_on_through_the_cache(family, part):
    """Each token is the one that a new pass over the whole text so far would give."""
    model, edits, tokens = causal_lm(family), [Edit(2, "add", 3.0)], [5, 17, 300, 41, 8, 5, 99]
    place, = places_of(model, 1, [part])
    width = model.find([place.site]).widths[place.site]
    sae = initialize(width, 2 * width, 8, "none", torch.zeros(width), seed=1)
    made = Continuation(model.module, place, tokens, temperature=1.0, seed=0, sae=sae, edits=edits)
    ids, draws = list(tokens), generator(0, "tokens of a continuation")
    for _ in range(8):
        token = made.step()
        with steering(place, sae, edits):
            logits_V = logits_of(model, torch.tensor([ids]))[0, -1].double()
        assert token == pick(logits_V, 1.0, draws.random())
        ids.append(token)
    plain = logits_of(model)
    with steering(place, sae, edits):
        assert not torch.equal(logits_of(model), plain)
    assert torch.equal(logits_of(model), plain) and hooks(model) == 0
