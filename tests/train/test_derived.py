"""Settings that a recipe leaves open."""

import pytest

from helpers import recipe
from olmoscope.recipe.load import load_recipe
from olmoscope.train.derived import batch_of, rate_of, settled


@pytest.mark.parametrize(("tokens", "batch"), [(3000, 256), (1_000_000, 256), (2_000_000, 512), (20_000_000, 4096),
                                               (10**9, 4096)])
def test_batch_grows_with_the_tokens(tmp_path, tokens, batch):
    open_one = recipe(tmp_path, tokens__count=tokens, train__batch=None)
    assert batch_of(open_one, open_one.train) == batch == settled(open_one, open_one.saes[0]).batch


def test_window_follows_width_and_k():
    full, tiny = load_recipe("olmo3-7b-think"), load_recipe("tiny")
    narrow, wide = settled(tiny, tiny.saes[0]), settled(full, full.saes[0])
    assert (narrow.auxiliary.k, narrow.auxiliary.dead_window) == (32, 140_000 // 30)
    assert (narrow.auxiliary.weight, wide.auxiliary.weight) == (1 / 8, 1 / 8)
    assert (narrow.decoder_rate, wide.decoder_rate) == (8, 8)
    assert (wide.batch, wide.auxiliary.k, wide.auxiliary.dead_window) == (4096, 64, 327680)


def test_rate_falls_with_the_channels_and_rises_where_steps_are_few(tmp_path):
    sae = {"layer": 1, "d_sae": 512, "k": 8, "weights": "untied"}
    one = recipe(tmp_path, tokens__count=10**6, train__batch=None, saes=[sae])
    assert rate_of(one, one.saes[0], 4096) == rate_of(one, one.saes[0], 256) / 16 == pytest.approx(1.4 / 4096)
    short = recipe(tmp_path, tokens__count=300 * 256, train__batch=None, saes=[sae])
    assert rate_of(short, short.saes[0], 256) == pytest.approx(2 * 1.4 / 256)
    tied = recipe(tmp_path, tokens__count=10**6, train__batch=None, saes=[sae | {"weights": "tied"}])
    assert rate_of(tied, tied.saes[0], 4096) == pytest.approx(2 / 4096)
    said = recipe(tmp_path, train__lr=0.5)
    assert rate_of(said, said.saes[0], 256) == 0.5


@pytest.mark.parametrize(("tokens", "window"), [(3000, 16 * 512 // 8), (60_000, 2000), (10**7, 160 * 512 // 8)])
def test_latents_are_revived_early_enough(tmp_path, tokens, window):
    one = recipe(tmp_path, tokens__count=tokens, saes=[{"layer": 1, "d_sae": 512, "k": 8, "weights": "untied"}])
    auxiliary = settled(one, one.saes[0]).auxiliary
    assert auxiliary.dead_window == window
    assert auxiliary.lift == pytest.approx(0.1 * (window / (160 * 512 / 8)) ** 0.5)
    shared = recipe(tmp_path, tokens__count=tokens, saes=[
        {"layer": 1, "d_sae": 512, "k": 8, "weights": "untied", "activation": "batchtopk"}])
    lift = settled(shared, shared.saes[0]).auxiliary.lift
    assert lift / window == pytest.approx(0.1 / (160 * 512 / 8))  # biases rise as fast at any length


def test_tied_weights_get_the_lift_alone(tmp_path):
    tied = recipe(tmp_path)
    found = settled(tied, tied.saes[0])
    assert (found.auxiliary.weight, found.auxiliary.lift, found.decoder_rate) == (0, 0.1, 1)
    assert found.auxiliary.dead_window == 160 * 512 / 8


def test_what_a_recipe_says_stays(tmp_path):
    said = recipe(tmp_path, train__batch=100, train__auxiliary={"k": 3, "dead_window": 7, "weight": 2.0})
    found = settled(said, said.saes[0])
    assert (found.batch, found.auxiliary.k, found.auxiliary.dead_window, found.auxiliary.weight) == (100, 3, 7, 2.0)
    reference = load_recipe("olmo3-7b-think", "reference")
    found = settled(reference, reference.saes[0])
    assert (found.batch, found.lr, found.auxiliary) == (256, 3e-4, None)
    assert found.model_dump() == reference.train.model_dump() | {"decoder_rate": 1, "seed": 0}
