"""The same latents from another seed: compared with scipy's assignment, and with known answers. (test_study.py tests
runs of a study.)"""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from olmoscope.evaluate import stability
from olmoscope.evaluate.stability import compare_latents
from olmoscope.sae.topk import TopK

F, D = 200, 64
ALL = torch.ones(F, dtype=torch.bool)


def rows(seed, count=F, width=D):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def sae(W_dec_FD, W_enc_FD=None):
    W_enc_FD = W_dec_FD if W_enc_FD is None else W_enc_FD
    return TopK(W_enc_FD, W_dec_FD, torch.zeros(W_dec_FD.shape[1]), "none", torch.zeros(len(W_dec_FD)), 4)


def cosines(first_FD, second_FD):
    first_FD, second_FD = (W_FD.double().numpy() for W_FD in (first_FD, second_FD))
    return (first_FD / np.linalg.norm(first_FD, axis=1, keepdims=True)) @ (
        second_FD / np.linalg.norm(second_FD, axis=1, keepdims=True)).T


@pytest.mark.parametrize("at_once", [2**25, 7 * F])
def test_equals_the_assignment_where_that_is_clear(monkeypatch, at_once):
    """Latents that another seed found more or less well: with noise of 0 to 2 times their length."""
    monkeypatch.setattr(stability, "_ELEMENTS_AT_ONCE", at_once)
    noise_F1, order = torch.linspace(0, 2, F)[:, None], torch.randperm(F, generator=torch.Generator().manual_seed(5))
    first = sae(rows(0), rows(1))
    second = sae((rows(0) + noise_F1 * rows(2))[order] * 3, (rows(1) + noise_F1 * rows(3))[order])
    found = compare_latents(first, second, ALL, ALL)
    decoder_FF, encoder_FF = cosines(first.W_dec, second.W_dec), cosines(first.W_enc, second.W_enc)
    pairs = linear_sum_assignment(decoder_FF, maximize=True)
    matched_F = decoder_FF[pairs] > 0.7
    assert found["matched_share_decoder"] == pytest.approx(matched_F.mean())
    assert found["matched_share"] == pytest.approx((matched_F & (encoder_FF[pairs] > 0.7)).mean())
    assert 0.1 < found["matched_share"] < found["matched_share_decoder"] < 0.9
    both = (decoder_FF.max(0).mean() + decoder_FF.max(1).mean()) / 2
    assert found["mmcs"] == pytest.approx(both, abs=1e-6)
    other_way = compare_latents(second, first, ALL, ALL)
    assert other_way == pytest.approx(found)


def test_a_permuted_copy_is_the_same_and_random_directions_are_not():
    first, width = sae(rows(0, width=256)), 256
    copy = compare_latents(first, sae(first.W_dec[torch.randperm(F)] * 0.1), ALL, ALL)
    assert (copy["matched_share"], copy["matched_share_decoder"], copy["mmcs"]) == (1, 1, pytest.approx(1))
    chance = compare_latents(first, sae(rows(1, width=width)), ALL, ALL)
    assert chance["matched_share"] == chance["matched_share_decoder"] == 0
    # The largest of F cosines, which are about normal with variance 1 / D; a bit over the mean, as such bounds are.
    assert 0.8 < chance["mmcs"] / (2 * np.log(F) / width) ** 0.5 < 1


def test_dead_latents_count_nowhere():
    first = sae(rows(0))
    second = sae(torch.cat([rows(0)[:150], rows(9, 50)]))
    alive = torch.arange(F) < 150
    assert compare_latents(first, second, alive, alive) == pytest.approx(dict.fromkeys(stability.FIGURES, 1.0))
    half = compare_latents(first, second, ALL, alive)
    assert half["matched_share"] == 2 * 150 / 350
    assert compare_latents(first, second, ~ALL, alive) == dict.fromkeys(stability.FIGURES)


def test_one_counterpart_serves_one_latent():
    """Two near-copies in one SAE have the same nearest latent in the other: only one of them is matched."""
    W_FD = rows(0, 4)
    first = sae(torch.cat([W_FD, W_FD[:1] + 0.05 * rows(1, 1)]))
    found = compare_latents(first, sae(torch.cat([W_FD, rows(2, 1)])), ALL[:5], ALL[:5])
    assert found["matched_share"] == pytest.approx(4 / 5)
