"""What a study says about the number of active latents, from constructed figures and on planted features."""

import re

import pytest
import torch

from olmoscope.evaluate.dictionary import measure_dictionary
from olmoscope.evaluate.l0_advice import l0_advice
from olmoscope.evaluate.study import Setting, Spread
from olmoscope.site import Site
from olmoscope.train.adam import Adam
from olmoscope.train.initialize import initialize
from olmoscope.train.step import Step


def setting(k, cosine, sd=None, layer=7, kind="topk"):
    figures = {"l0": Spread(float(k), 0.0, 3), "decoder_cosine": Spread(cosine, sd, 1 if sd is None else 3)}
    varies = {"sae.k": k, "sae.layer": layer, "sae.activation": kind}
    return Setting(f"{kind}_{k}", Site(layer), varies, [], figures, {})


@pytest.mark.parametrize(("cosines", "wanted"), [
    ((0.09, 0.08, 0.07), "falls up to the largest L0 tried (32): k may be too low, try a larger one"),
    ((0.07, 0.08, 0.09), "is smallest at the smallest L0 tried (8): k may be too high, try a smaller one"),
    ((0.08, 0.07, 0.09), "is smallest at L0 16")])
def test_where_the_smallest_is(cosines, wanted):
    (said,) = l0_advice([setting(k, cosine) for k, cosine in zip((8, 16, 32), cosines, strict=True)])
    assert said.startswith("layers.7, topk: the mean |cosine| of decoder directions") and wanted in said
    assert "the uncertainty is unknown" in said and "0.0700 at L0" in said


def test_what_the_seeds_cannot_tell_apart_is_said():
    (said,) = l0_advice([setting(8, 0.08, 0.001), setting(16, 0.0705, 0.001), setting(32, 0.07, 0.001)])
    assert "L0 16 to 32 cannot be told apart" in said


def test_kinds_and_sites_are_apart_and_few_are_not_judged():
    several = [setting(k, 0.1 / k, layer=layer, kind=kind) for layer in (3, 7) for kind in ("topk", "jumprelu")
               for k in (8, 16, 32)]
    assert [re.split(r"[,:] ", said)[:2] for said in l0_advice(several)] == [
        ["layers.3", "topk"], ["layers.3", "jumprelu"], ["layers.7", "topk"], ["layers.7", "jumprelu"]]
    assert l0_advice(several[:2]) == [] == l0_advice([setting(k, None) for k in (8, 16, 32)])


def test_too_few_active_latents_are_seen_where_features_occur_together():
    """Rows of about 3 of 48 directions, four of which occur together: an SAE of k 1 mixes them, so its directions are
    more alike than those of k 4. (This does not show that k 16 is too many; the paper shows it on other toy models.)"""
    generator = torch.Generator().manual_seed(0)
    directions_FD = torch.nn.functional.normalize(torch.randn(48, 32, generator=generator), dim=1)
    found = {}
    for k in (1, 4):
        draws = torch.Generator().manual_seed(1)
        sae = initialize(32, 48, k, "none", torch.zeros(32), 0, tied=False)
        step = Step(sae, Adam((0.9, 0.999), 1e-8))
        for number in range(800):
            groups_BG = torch.rand(256, 12, generator=draws).topk(1, dim=1).indices
            active_BF = torch.zeros(256, 48)
            for offset in range(4):  # four features that occur together, each of its own strength
                active_BF.scatter_(1, groups_BG * 4 + offset, torch.rand(256, 1, generator=draws) + 0.5)
            drop_BF = torch.rand(256, 48, generator=draws) < 0.3
            step(active_BF.masked_fill(drop_BF, 0) @ directions_FD + 1e-3, 3e-3 * (1 - number / 800))
        found[k] = measure_dictionary(sae).mean_absolute
    assert found[4] < 0.9 * found[1], found
