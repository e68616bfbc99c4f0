"""Every figure against a dense float64 computation and against SAELens's own; the same for any batch size."""

import numpy as np
import pytest
import torch

from olmoscope.evaluate.reconstruction import RandomDirections, Reconstruction
from olmoscope.sae.rows import normalize_rows, restore_rows
from olmoscope.sae.topk import TopK, initialize

ROWS, D, F, K = 500, 24, 96, 6


def subject(normalize):
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(ROWS, D, generator=generator) * torch.linspace(0.5, 3, D) + 2
    mean_D = normalize_rows(x_BD, normalize)[0].mean(0)
    sae = initialize(D, F, K, normalize, mean_D, seed=1)
    sae.b_latent_F[:40] -= 100  # never active
    sae.b_latent_F[40:60] += torch.randn(20, generator=generator)
    return sae, x_BD


def measure(sae, x_BD, batch):
    measured = Reconstruction(sae)
    for start in range(0, len(x_BD), batch):
        measured.add(x_BD[start : start + batch])
    return measured.figures()


def dense_figures(sae: TopK, x_BD):
    """The definitions, word for word, dense and in float64."""
    W, b, pre, x = (t.double() for t in (sae.W_dec_FD, sae.b_latent_F, sae.b_pre_D, x_BD))
    n, statistics = normalize_rows(x, sae.normalize)
    scores = (n - pre) @ W.T + b
    top = scores.topk(sae.k, dim=1)
    z = torch.zeros_like(scores).scatter(1, top.indices, top.values).relu()
    xhat = restore_rows(z @ W + pre, statistics)
    error2, x2 = (x - xhat).square().sum(1), x.square().sum(1)
    density = (z > 0).double().mean(0)
    return {
        "rows": len(x),
        "fvu": error2.sum() / (x - x.mean(0)).square().sum(),
        "explained_variance": 1 - error2.sum() / (x - x.mean(0)).square().sum(),
        "nmse": (error2 / x2).mean(),
        "cosine": torch.cosine_similarity(x, xhat, dim=1).mean(),
        "l2_ratio": (xhat.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": xhat.square().sum(1).mean() / (x * xhat).sum(1).mean(),
        "l0.mean": (z > 0).sum(1).double().mean(),
        "l0.p50": np.percentile((z > 0).sum(1).numpy(), 50, method="higher"),
        "l1": z.sum(1).mean(),
        "dead.share": (density == 0).double().mean(),
        "density.over_1_percent": (density > 0.01).double().mean(),
        "density.over_10_percent": (density > 0.1).double().mean(),
    }


def flat(figures, prefix=""):
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_equals_a_dense_computation(normalize):
    sae, x_BD = subject(normalize)
    figures = dict(flat(measure(sae, x_BD, 64)))
    for name, want in dense_figures(sae, x_BD).items():
        assert figures[name] == pytest.approx(float(want), rel=1e-5), name
    assert sum(figures["density.latents"]) == F
    assert figures["density.latents"][0] == round(figures["dead.share"] * F) >= 40


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_does_not_depend_on_the_batch_size(normalize):
    sae, x_BD = subject(normalize)
    whole = dict(flat(measure(sae, x_BD, 4096)))
    for batch in (1, 7):
        for name, value in flat(measure(sae, x_BD, batch)):
            assert value == pytest.approx(whole[name], rel=1e-6), name


def test_explained_variance_equals_saelens(tmp_path):
    """SAELens: 1 − E‖x − x̂‖² / (E‖x‖² − ‖E x‖²), on its own encode and decode."""
    from sae_lens import SAE

    from olmoscope.release.saelens_format import hook_names, write_saelens

    for normalize in ("none", "layer_norm"):
        sae, x_BD = subject(normalize)
        metadata = {"model_name": "m", "prepend_bos": False, **hook_names("model.layers", 0)}
        write_saelens(sae, tmp_path / normalize, metadata)
        theirs = SAE.load_from_disk(tmp_path / normalize)
        xhat_BD = theirs(x_BD).double()
        x = x_BD.double()
        residual = (x - xhat_BD).square().sum(1).mean()
        want = 1 - residual / (x.square().sum(1).mean() - x.mean(0).square().sum())
        assert measure(sae, x_BD, 64)["explained_variance"] == pytest.approx(float(want), rel=1e-5)


def test_perfect_and_empty_reconstructions():
    sae, x_BD = subject("none")
    codes = sae.encode(x_BD)
    perfect = Reconstruction(sae)
    perfect.add_reconstruction(x_BD, x_BD, codes)
    figures = perfect.figures()
    assert (figures["fvu"], figures["nmse"]) == (0, 0)
    assert figures["cosine"] == pytest.approx(1)
    mean = Reconstruction(sae)
    mean.add_reconstruction(x_BD, x_BD.double().mean(0).expand_as(x_BD), codes)
    assert mean.figures()["fvu"] == pytest.approx(1)
    zero = Reconstruction(sae)
    zero.add_reconstruction(x_BD, torch.zeros_like(x_BD), codes)
    assert zero.figures()["nmse"] == 1
    assert zero.figures()["relative_reconstruction_bias"] is None


def test_random_directions_leave_their_share():
    """k of d random directions catch k/d of an isotropic variance."""
    x_BD = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    values = [RandomDirections(64, 16, seed).nmse(x_BD, x_BD.mean(0)) for seed in range(5)]
    assert np.mean(values) == pytest.approx(1 - 16 / 64, abs=0.01)
