"""Names of sites: text, order, folders, TransformerLens' names, and back."""

import random

import pytest

from olmoscope.errors import UserError
from olmoscope.site import EMBED, PARTS, Site, deepest, wildcard

ALL = [EMBED, *(Site(layer, part) for layer in (0, 7, 31) for part in PARTS)]


@pytest.mark.parametrize("site", ALL, ids=str)
def test_text_and_back(site):
    assert Site.parse(str(site)) == site
    assert Site.of_transformer_lens(site.transformer_lens) == site


def test_a_number_is_the_output_of_a_layer():
    assert Site.parse(7) == Site.parse("layers.7") == Site(7)


def test_sites_sort_as_a_forward_pass_reaches_them():
    shuffled = ALL.copy()
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled) == ALL


def test_folders_differ_and_the_residual_streams_stay_what_they_were():
    assert len({site.folder for site in ALL}) == len(ALL)
    assert (Site(7).folder, Site(7, "mlp.out").folder, EMBED.folder) == ("layer_07", "layer_07_mlp_out", "embed")


@pytest.mark.parametrize("text", ["layer.7", "layers.7.", "layers.-1", "layers.7.mlp", "layers.x", "", None, True, -1,
                                  1.5])
def test_what_is_no_site_is_refused_in_a_line(text):
    with pytest.raises(UserError, match=r"is not a site; a site is embed, layers\.L, or layers\.L followed by one of "):
        Site.parse(text)


def test_resid_pre_is_the_output_of_the_layer_before():
    assert Site.of_transformer_lens("blocks.3.hook_resid_pre") == Site(2)
    assert Site.of_transformer_lens("blocks.0.hook_resid_pre") == EMBED
    assert Site.of_transformer_lens("blocks.3.attn.hook_q") is None
    assert Site.of_transformer_lens("transformer.h.3") is None


def test_wildcards_and_the_deepest_layer():
    assert wildcard("layers.*.mlp.out", 3) == [Site(0, "mlp.out"), Site(1, "mlp.out"), Site(2, "mlp.out")]
    assert wildcard("embed", 3) == [EMBED]
    assert deepest([EMBED]) == 0
    assert deepest([Site(2, "attn.in"), Site(1)]) == 2
