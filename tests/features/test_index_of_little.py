"""Indexes with little or nothing in them: no firings, no companions, no examples, one token, no promoted tokens."""

import json

import numpy as np
import pytest
import torch

from helpers import save_small_model
from little_index import D, F, made, model_without_norm, silent_sae
from olmoscope.browse.collection import open_collection
from olmoscope.browse.payload import feature_payload
from olmoscope.features.format import Options
from olmoscope.sae.topk import TopK
from olmoscope.train.initialize import initialize


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small_model("Llama", tmp_path_factory.mktemp("model"))


def test_one_latent_a_row_has_no_companions(model, tmp_path):
    index = made(initialize(D, F, 1, "none", torch.zeros(D), seed=0), model, tmp_path)
    assert index.info.firings and not any(index.feature(number).companions for number in range(F))


def test_no_feature_fires(model, tmp_path):
    index = made(silent_sae(), model, tmp_path)
    assert (index.info.firings, index.info.dead) == (0, F)
    feature = index.feature(0)
    assert feature.top == feature.random == feature.companions == feature.tokens == [] and feature.promoted


def test_no_examples_and_no_lists(model, tmp_path):
    """With the smallest options."""
    index = made(initialize(D, F, 4, "none", torch.zeros(D), seed=0), model, tmp_path,
                 options=Options(top=1, per_interval=0, random=0, nearest=0))
    feature = index.feature(int(np.argmax([index.feature(number).rows for number in range(F)])))
    assert len(feature.top) == 1 and feature.random == feature.tokens == feature.neighbours == feature.promoted == []


@pytest.mark.parametrize("sae", [
    TopK(torch.ones(1, D), torch.zeros(1, D), torch.zeros(D), "none", torch.zeros(1), 1),
    initialize(D, 1, 1, "none", torch.zeros(D), seed=0)], ids=["a direction without length", "one latent"])
def test_one_latent(model, tmp_path, sae):
    assert made(sae, model, tmp_path).feature(0).neighbours == []


def test_no_latent_is_its_own_neighbour(model, tmp_path):
    """This holds even if there are fewer latents than neighbours requested."""
    index = made(initialize(D, 5, 2, "none", torch.zeros(D), seed=0), model, tmp_path)
    assert all(number not in [one.feature for one in index.feature(number).neighbours] for number in range(5))
    assert any(index.feature(number).neighbours for number in range(5))


@pytest.mark.parametrize("text", ["a", "a a a a a a a a", "x" * 400])
def test_one_token_and_one_sequence(model, tmp_path, text):
    index = made(initialize(D, F, 4, "none", torch.zeros(D), seed=0), model, tmp_path, text)
    assert index.info.documents == 1 and index.info.sequences >= 1


def test_one_row(model, tmp_path):
    assert made(initialize(D, F, 4, "none", torch.zeros(D), seed=0), model, tmp_path, tokens=1).info.rows == 1


def test_a_model_without_a_final_norm(tmp_path, capsys):
    """An index without promoted tokens, which says why, on the terminal and to the page."""
    index = made(initialize(D, F, 4, "none", torch.zeros(D), seed=0), model_without_norm(tmp_path / "model"), tmp_path)
    said = capsys.readouterr().err
    assert said.count("note: the index has no promoted tokens: ") == 1
    assert index.info.unembedding is None and index.info.no_unembedding in said
    assert index.feature(3).promoted is None and index.feature(3).suppressed is None and index.feature(3).neighbours
    assert {line.promoted for line in index.table().lines} == {None}
    (shown,) = open_collection(tmp_path / "index", None).values()
    payload = feature_payload(shown.index, 3, {})
    assert payload["promoted"] is None and payload["suppressed"] is None
    saes = json.loads((tmp_path / "site" / "data" / "saes.json").read_text())["saes"]
    assert saes[0]["no_promoted"] == index.info.no_unembedding
    part = next((tmp_path / "index" / "features").iterdir())
    assert b"promoted" not in part.read_bytes()
