"""Largest cosines against a dense float64 computation."""

import numpy as np
import pytest
import torch

from olmoscope.evaluate import dictionary
from olmoscope.evaluate.dictionary import decoder_cosines, measure_dictionary
from olmoscope.sae.topk import TopK

F, D = 300, 24


def sae():
    """Directions of all lengths; two copies of the first, one opposite to it, one of length 0."""
    W_FD = torch.randn(F, D, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 50, F)[:, None]
    W_FD[7], W_FD[8], W_FD[9], W_FD[10] = 3 * W_FD[0], 0.5 * W_FD[0], -W_FD[0], 0
    return TopK(W_FD, W_FD, torch.zeros(D), "none", torch.zeros(F), 4)


def dense(W_FD):
    unit_FD = torch.nn.functional.normalize(W_FD.double(), dim=1)
    cosines_FF = unit_FD @ unit_FD.T
    cosines_FF.fill_diagonal_(-torch.inf)
    return cosines_FF.max(dim=1).values


@pytest.mark.parametrize("at_once", [2**25, 7 * F])
def test_equals_a_dense_computation(monkeypatch, at_once):
    monkeypatch.setattr(dictionary, "_ELEMENTS_AT_ONCE", at_once)
    one = sae()
    (found_F, absolute_F), want_F = decoder_cosines(one, torch.arange(F)), dense(one.W_dec)
    every_F = torch.nn.functional.cosine_similarity(one.W_dec.double()[:, None], one.W_dec.double()[None], dim=2).abs()
    torch.testing.assert_close(absolute_F.double(), (every_F.sum(1) - every_F.diagonal()) / (F - 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found_F.double(), want_F, rtol=0, atol=1e-6)
    assert torch.allclose(found_F[torch.tensor([0, 7, 8])], torch.ones(3), atol=1e-6)
    measured = measure_dictionary(one)
    assert measured.latents == sum(measured.counts) == F
    assert measured.mean_absolute == pytest.approx(float(absolute_F.mean()))
    assert measured.mean == pytest.approx(float(want_F.mean()), abs=1e-6)
    assert measured.p95 == pytest.approx(float(np.percentile(want_F, 95)), abs=1e-6)
    assert measured.largest == pytest.approx(1, abs=1e-6)
    assert measured.over_90_percent == pytest.approx(float((want_F > 0.9).double().mean()))


def test_a_wide_dictionary_is_sampled(monkeypatch):
    monkeypatch.setattr(dictionary, "ALL_UP_TO", 200)
    monkeypatch.setattr(dictionary, "SAMPLE", 50)
    measured = measure_dictionary(sae())
    assert measured.latents == sum(measured.counts) == 50
    assert measured == measure_dictionary(sae())
