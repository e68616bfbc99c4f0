"""Logistic regression reaches the optimum by autograd, even with more columns than rows; AUC equals a count."""

import itertools

import pytest
import torch

from olmoscope.evaluate.logistic import Probe, accuracy, area_under_curve, fit


def rows(N, P, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_NP = torch.randn(N, P, generator=generator) * torch.linspace(0.1, 5, P) + 3
    return x_NP, x_NP[:, 0] + x_NP[:, -1] / 5 + torch.randn(N, generator=generator) > x_NP[:, -1].mean() / 5 + 3


def gradient(probe, x_NP, y_N, C, weight_N):
    w_P, b = probe.w_P.clone().requires_grad_(), probe.b.clone().requires_grad_()
    margin_N = torch.where(y_N, 1.0, -1.0) * (x_NP.double() @ w_P + b)
    loss = C * (weight_N * torch.log1p(torch.exp(-margin_N))).sum() + w_P.square().sum() / 2
    return [float(each.norm()) / float(loss.detach()) for each in torch.autograd.grad(loss, (w_P, b))]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("N", "P"), [(200, 1), (200, 12), (60, 100)])
def test_no_gradient_is_left(N, P, balanced):
    x_NP, y_N = rows(N, P)
    share = float(y_N.double().mean())
    weight_N = torch.where(y_N, 0.5 / share, 0.5 / (1 - share)).double() if balanced else torch.ones(N).double()
    probe = None
    for C in (1e-5, 1e-2, 1.0, 1e4):
        probe = fit(x_NP, y_N, C, probe, balanced=balanced)
        assert max(gradient(probe, x_NP, y_N, C, weight_N)) < 1e-4
        fresh = fit(x_NP, y_N, C, balanced=balanced)
        torch.testing.assert_close(probe(x_NP), fresh(x_NP), rtol=1e-3, atol=1e-3)


def test_a_latent_that_never_fires_gives_no_direction():
    probe = fit(torch.zeros(20, 1), torch.arange(20) < 5, 1.0)
    assert probe.w_P.tolist() == [0] and float(probe.b) == pytest.approx(torch.tensor(5 / 15).log())


def test_area_is_the_share_of_pairs_in_order():
    score_N = torch.tensor([0.0, 1, 1, 2, 3, 3, 5])
    y_N = torch.tensor([False, True, False, True, False, True, True])
    pairs = [(float(a > b) + float(a == b) / 2) for a, b in itertools.product(score_N[y_N], score_N[~y_N])]
    assert area_under_curve(score_N, y_N) == pytest.approx(sum(pairs) / len(pairs))
    assert area_under_curve(-score_N, y_N) == pytest.approx(1 - sum(pairs) / len(pairs))


def test_accuracy():
    probe = Probe(torch.tensor([1.0]).double(), torch.tensor(-1.0).double())
    score_N = probe(torch.tensor([[0.0], [2.0], [3.0], [0.5]]))
    assert accuracy(score_N, torch.tensor([False, True, False, False])) == 0.75
