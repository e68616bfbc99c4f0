"""Every figure of an index equals what a dense float64 computation gives, on a small SAE."""

import math

import numpy as np
import pytest
import torch

from feature_index import small_index
from olmoscope.activations.store.reader import open_store
from olmoscope.features.corpus import PASSAGE
from olmoscope.features.format import INTERVALS, sae_place
from olmoscope.features.read import FeatureIndex
from olmoscope.features.rows_of import index_sae
from olmoscope.recipe.schema import Filter, Model
from olmoscope.sae.io.open import open_sae

FILTER = Filter(special_tokens=True, first_positions=2)


@pytest.fixture(scope="module", params=[0, 1], ids=["none", "layer norm, filtered"])
def index(request, tmp_path_factory):
    path = small_index(tmp_path_factory.mktemp("index"), request.param)
    if request.param:
        path = index_sae(str(path.parent), out=path.parent / "filtered", filter_=FILTER, device="cpu").folder
    return FeatureIndex(path)


@pytest.fixture(scope="module")
def subject(index):
    return open_sae(sae_place(index.path, index.info))


@pytest.fixture(scope="module")
def text(index):
    """The facts about each token of the store, in the order of the text, straight from its files; and x `[T, D]`."""
    store = open_store(next(parent for parent in index.path.parents if parent.name == "out") / "store" / "train")
    rows = [store.read_rows(segment) for segment in range(store.manifest.segments)]
    text = {name: np.concatenate([one[name].numpy() for one in rows]) for name in
            ("token_id", "sequence", "position", "source")}
    order = np.lexsort((text["position"], text["sequence"]))
    x_TD = torch.cat([store.read(index.info.sae.site, segment, slice(0, count))
                      for segment, count in enumerate(store.segment_rows)])
    special = np.isin(text["token_id"], store.manifest.special_token_ids)
    kept = ~special & (text["position"] >= 2) if index.info.filter == FILTER else np.ones(len(order), bool)
    text |= {"kept": kept, "ends": text["token_id"] == 0}
    return {name: array[order] for name, array in text.items()} | {"x": x_TD[torch.from_numpy(order)]}


@pytest.fixture(scope="module")
def z_TF(index, text):
    """The dense code of each token, float64, from the index's own float32 values."""
    z_TF = np.zeros((index.info.tokens, index.info.sae.d_sae))
    for feature in range(index.info.sae.d_sae):
        places, values = index.firing_values(feature)
        assert (np.diff(places) > 0).all()
        z_TF[places, feature] = values
    return z_TF


def close(ours, theirs):
    assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6)


def score(rows, lift):
    return rows * math.log(lift)


def test_firings_are_the_codes_of_the_rows(subject, text, z_TF):
    """Against the SAE's formula in float64."""
    sae, x_TD = subject.sae, text["x"].double()
    if sae.normalize == "layer_norm":
        x_TD = x_TD - x_TD.mean(1, keepdim=True)
        x_TD = x_TD / (x_TD.std(1, keepdim=True) + 1e-5)
    pre_TF = (x_TD - sae.b_in.double()) @ sae.W_enc.double().T + sae.b_latent.double()
    top = pre_TF.topk(sae.k)
    dense_TF = torch.zeros_like(pre_TF).scatter(1, top.indices, top.values.relu()).numpy()
    dense_TF[~text["kept"]] = 0
    assert ((dense_TF > 0) == (z_TF > 0)).all()
    np.testing.assert_allclose(z_TF, dense_TF, rtol=1e-4, atol=1e-5)


def test_the_manifest_counts(index, text, z_TF):
    info, kept = index.info, text["kept"]
    assert (info.tokens, info.rows, info.sample_rows) == (3000, kept.sum(), kept.sum())
    assert info.filter == FILTER or kept.all()
    assert info.firings == (z_TF > 0).sum()
    assert info.dead == (z_TF.max(0) == 0).sum()
    assert info.sources == {"web": kept.sum()}
    assert info.sequences == len(np.unique(text["sequence"]))
    assert index.corpus.tokens_T.tolist() == text["token_id"].tolist()
    assert (index.corpus.kept_T > 0).tolist() == kept.tolist()
    starts = [0, *(np.flatnonzero(text["ends"])[:-1] + 1)] if text["ends"][-1] else [0, *(
        np.flatnonzero(text["ends"]) + 1)]
    assert index.corpus.documents_N.tolist() == starts


def test_counts_and_histograms(index, z_TF):
    for number, z_T in enumerate(z_TF.T):
        feature, active = index.feature(number), z_T[z_T > 0]
        assert feature.rows == len(active) and feature.density == len(active) / index.info.rows
        close(feature.mean, active.mean() if len(active) else 0)
        assert feature.max == active.max(initial=0)
        if len(active):
            assert feature.histogram.counts == np.histogram(active, feature.histogram.edges)[0].tolist()
            assert sum(feature.histogram.counts) == len(active)
            close(np.diff(np.log2(feature.histogram.edges)), 0.25)
        for place, interval in enumerate(feature.intervals):
            assert interval.low == feature.max * place / INTERVALS
            parts = np.ceil(active * INTERVALS / feature.max) - 1 if len(active) else active
            assert interval.rows == (parts == place).sum()


def test_examples(index, text, z_TF):
    changes = np.flatnonzero(np.diff(text["sequence"], prepend=-1) | np.concatenate([[True], text["ends"][:-1]]))
    passage_T = np.zeros(len(text["ends"]), int)
    for start, end in zip(changes, [*changes[1:], len(passage_T)], strict=True):
        passage_T[start:end] = [start + step // PASSAGE for step in range(end - start)]
    assert len(np.unique(passage_T)) == len(np.unique(index.corpus.passages_T()))
    for number, z_T in enumerate(z_TF.T):
        feature = index.feature(number)
        strongest = {}
        for place in np.flatnonzero(z_T):
            if z_T[place] > z_T[strongest.get(passage_T[place], -1)] or passage_T[place] not in strongest:
                strongest[passage_T[place]] = place
        expected = sorted(strongest.values(), key=lambda place: (-z_T[place], place))[: index.info.options.top]
        assert [(one.place, one.value) for one in feature.top] == [(place, z_T[place]) for place in expected]
        assert len(feature.random) == min(index.info.options.random, feature.rows)
        for interval in feature.intervals:
            assert len(interval.examples) == min(index.info.options.per_interval, interval.rows)
            assert all(interval.low < one.value <= interval.high * (1 + 1e-12) for one in interval.examples)
        for examples in (feature.random, *(interval.examples for interval in feature.intervals)):
            places = [one.place for one in examples]
            assert places == sorted(set(places))
            assert [one.value for one in examples] == z_T[places].tolist() and all(z_T[places] > 0)


def test_random_examples_are_spread_over_the_text(index):
    """All n rows are equally likely: the mean rank of the drawn rows is that of a uniform draw."""
    deviations = []
    for number in index.order("rows")[:60]:
        places = index.firing_values(int(number))[0]
        ranks = np.searchsorted(places, [one.place for one in index.feature(int(number)).random])
        if len(places) > 2 * len(ranks):
            deviations.append((ranks.mean() - (len(places) - 1) / 2) / (len(places) / math.sqrt(12 * len(ranks))))
    assert len(deviations) > 20
    assert abs(np.mean(deviations)) < 4 / math.sqrt(len(deviations))
    assert 0.5 < np.std(deviations) < 1.6


def test_preferred_tokens_sources_and_positions(index, text, z_TF):
    kept, rows = text["kept"], index.info.rows
    rows_of = np.bincount(text["token_id"][kept])
    for number, z_T in enumerate(z_TF.T):
        feature, fires = index.feature(number), z_T > 0
        found = []
        for token in np.unique(text["token_id"][fires]):
            here = fires & (text["token_id"] == token)
            lift = here.sum() * rows / (fires.sum() * rows_of[token])
            if lift > 1:
                found.append((-score(here.sum(), lift), int(token), int(here.sum()), lift, z_T[here].mean()))
        found = sorted(found)[: index.info.options.nearest]
        close([score(one.rows, one.lift) for one in feature.tokens], [-one[0] for one in found])
        by_token = {one[1]: one for one in found}
        for one in feature.tokens:
            assert one.token.text == index.tokens.text(one.token.id)
            if one.token.id in by_token:  # among equal scores, the last place may go to another
                assert one.rows == by_token[one.token.id][2]
                close((one.lift, one.mean), by_token[one.token.id][3:])
        assert [(one.source, one.rows) for one in feature.sources] == [("web", fires.sum())]
        assert all(one.lift == pytest.approx(1) for one in feature.sources if one.rows)
        assert sum(one.rows for one in feature.positions) == fires.sum()
        for one in feature.positions:
            here = (text["position"] >= one.first) & (text["position"] <= one.last)
            assert one.rows == (here & fires).sum()
            if one.rows:
                close(one.lift, (here & fires).sum() / fires.sum() / ((here & kept).sum() / rows))


def test_companions(index, z_TF):
    """All rows are in the sample here."""
    fires_TF = (z_TF > 0).astype(np.float64)
    both_FF, fired_F, rows = fires_TF.T @ fires_TF, fires_TF.sum(0), index.info.rows
    for number in range(index.info.sae.d_sae):
        feature = index.feature(number)
        found = []
        for other in np.flatnonzero(both_FF[number] >= 2):
            lift = both_FF[number, other] * rows / (fired_F[number] * fired_F[other])
            if other != number and lift > 1:
                found.append(score(both_FF[number, other], lift))
        close([score(one.rows, one.lift) for one in feature.companions],
              sorted(found, reverse=True)[: index.info.options.nearest])
        for one in feature.companions:
            assert one.rows == both_FF[number, one.feature]
            close(one.lift, one.rows * rows / (fired_F[number] * fired_F[one.feature]))


def test_neighbours_and_logits(index, subject):
    """Against float64, and the real model's own final norm and unembedding."""
    from olmoscope.model.splice import load_causal_lm

    causal = load_causal_lm(Model(name="tiny", dtype="float32"), torch.device("cpu")).module
    W_FD = subject.sae.W_dec.double()
    unit_FD = W_FD / W_FD.norm(dim=1, keepdim=True)
    cosine_FF = (unit_FD @ unit_FD.T).fill_diagonal_(-2).numpy()
    logits_FV = ((W_FD * causal.model.norm.weight.double()) @ causal.lm_head.weight.double().T).numpy()
    assert "tied unembedding, final RMS norm" in index.info.unembedding
    for number in range(index.info.sae.d_sae):
        feature = index.feature(number)
        cosines, logits = cosine_FF[number], logits_FV[number]
        close([one.cosine for one in feature.neighbours], np.sort(cosines)[::-1][:10].tolist())
        close([cosines[one.feature] for one in feature.neighbours], [one.cosine for one in feature.neighbours])
        for ours, expected in ((feature.promoted, np.sort(logits)[::-1][:10]),
                               (feature.suppressed, np.sort(logits)[:10])):
            close([one.logit for one in ours], expected.tolist())
            close([logits[one.token.id] for one in ours], [one.logit for one in ours])


def test_promoted_tokens_are_those_that_a_small_step_raises(index, subject):
    """The logit lens as intended: the real model's logits before and after a small step along the direction."""
    from olmoscope.model.splice import load_causal_lm

    causal = load_causal_lm(Model(name="tiny", dtype="float32"), torch.device("cpu")).module.double()
    generator = torch.Generator().manual_seed(0)
    row_D = torch.randn(index.info.sae.d_model, generator=generator, dtype=torch.float64)
    for number in (0, 5, 100):
        direction_D = subject.sae.W_dec[number].double()
        across_D = direction_D - (direction_D @ row_D) / (row_D @ row_D) * row_D  # along the row, the norm undoes it
        step = 0.02  # transformers' norm computes in float32
        with torch.no_grad():
            more_V, less_V = (causal.lm_head(causal.model.norm(row_D + sign * step * across_D).double())
                              for sign in (1, -1))
            raised_V = (more_V - less_V) / (2 * step) * row_D.square().mean().sqrt()
            along_V = causal.lm_head(causal.model.norm.weight * (direction_D - across_D))
        feature = index.feature(number)
        for one in feature.promoted + feature.suppressed:
            assert one.logit == pytest.approx(float(raised_V[one.token.id] + along_V[one.token.id]), rel=2e-3, abs=1e-3)
