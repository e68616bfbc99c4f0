"""Statistics of a store equal plain numpy over all of its rows, and so does the error of the store's dtype."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import recipe, save_small_model, small_model, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.format import read_activations, read_rows, segment_path
from olmoscope.activations.store.statistics import POSITIONS
from olmoscope.errors import UserError
from olmoscope.site import Site

LAYERS = [1, 7]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_documents(folder, count=90)
    return folder


def collected(corpus, store, **changes):
    """Collects, and reads everything back: statistics.json, rows and activations by layer in float64."""
    result = collect(recipe(corpus, **({"model__dtype": "bfloat16"} | changes)), "train", store)
    rows, x = [], {site.layer: [] for site in result.manifest.sites}
    for segment in range(result.manifest.segments):
        rows.append(read_rows(store, segment)["position"].numpy())
        for layer, parts in x.items():
            parts.append(read_activations(store, Site(layer), segment, slice(0, len(rows[-1]))).double().numpy())
    return result.statistics, np.concatenate(rows), {layer: np.concatenate(parts) for layer, parts in x.items()}


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    store = tmp_path_factory.mktemp("plain")
    return store, *collected(corpus, store)


def test_figures_equal_numpy_s(plain):
    store, statistics, positions, x = plain
    assert statistics == json.loads((store / "statistics.json").read_text())
    tensors = load_file(store / "statistics.safetensors")
    assert statistics["rows"] == 3000
    for layer in LAYERS:
        x_RD, figures = x[layer], statistics["sites"][f"layers.{layer}"]
        mean_D = x_RD.mean(axis=0)
        np.testing.assert_allclose(tensors[f"layer_{layer:02d}.mean"].numpy(), mean_D, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(tensors[f"layer_{layer:02d}.largest"].numpy(), np.abs(x_RD).max(axis=0))
        assert figures["mean_norm"] == pytest.approx(np.linalg.norm(mean_D), rel=1e-9)
        assert figures["std_norm"] == pytest.approx(np.sqrt(x_RD.var(axis=0).sum()), rel=1e-5)
        assert figures["mean_over_std"] == pytest.approx(figures["mean_norm"] / figures["std_norm"])
        assert figures["largest"] == np.abs(x_RD).max()
        assert np.abs(x_RD[:, figures["largest_channel"]]).max() == figures["largest"]
        assert (figures["non_finite"], figures["added_fvu"], figures["float16"]) == (0, 0, True)
        assert figures["largest"] < figures["bound"]
        norm_R = np.linalg.norm(x_RD, axis=1)
        check_quantiles(figures["norm"], norm_R)
        groups = figures["norm_by_position"]
        assert sum(group["rows"] for group in groups) == 3000
        for group in groups:
            inside = (positions >= group["from"]) & (positions <= group["to"])
            assert group["rows"] == inside.sum()
            check_quantiles(group, norm_R[inside])
    assert [group["from"] for group in groups] == [start for start in POSITIONS if start < 128]


def check_quantiles(figures, norm_R):
    for name, share in (("p1", 0.01), ("p50", 0.5), ("p95", 0.95), ("p99.9", 0.999)):
        assert figures[name] == pytest.approx(np.quantile(norm_R, share, method="inverted_cdf"), rel=0.008)


def test_float8_reads_back_near_and_its_error_is_measured(corpus, plain, tmp_path):
    _, _, _, x = plain
    statistics, _, x8 = collected(corpus, tmp_path, activations__dtype="float8_e4m3")
    for layer in LAYERS:
        error = np.square(x8[layer] - x[layer]).sum()
        fvu = error / np.square(x[layer] - x[layer].mean(axis=0)).sum()
        assert statistics["sites"][f"layers.{layer}"]["added_fvu"] == pytest.approx(fvu, rel=1e-4)
        assert 1e-4 < fvu < 5e-3
        row_R = np.sqrt(np.square(x8[layer] - x[layer]).sum(axis=1) / np.square(x[layer]).sum(axis=1))
        assert row_R.max() < 0.05
    sizes = {dtype: sum(path.stat().st_size for path in folder.glob("layer_01/*"))
             for dtype, folder in (("bf16", plain[0]), ("fp8", tmp_path))}
    assert sizes["fp8"] < 0.55 * sizes["bf16"]
    part = read_activations(tmp_path, Site(1), 0, slice(100, 110))
    assert part.dtype == torch.bfloat16
    assert torch.equal(part, read_activations(tmp_path, Site(1), 0, slice(0, 200))[100:110])


def test_float16_and_float32_hold_bfloat16_values(corpus, plain, tmp_path):
    for dtype in ("float16", "float32"):
        statistics, _, x = collected(corpus, tmp_path / dtype, activations__dtype=dtype)
        for layer in LAYERS:
            np.testing.assert_allclose(x[layer], plain[3][layer], rtol=1e-3, atol=1e-5)
            assert statistics["sites"][f"layers.{layer}"]["added_fvu"] < 1e-9


def test_a_float32_model_in_bfloat16_loses_what_is_measured(corpus, tmp_path):
    save_small_model("GPT2", tmp_path / "model")
    changes = {"model__name": str(tmp_path / "model"), "model__dtype": "float32", "activations__layers": [3],
               "saes": [{"layer": 3, "d_sae": 64, "k": 4}]}
    _, _, exact = collected(corpus, tmp_path / "exact", **changes, activations__dtype="float32")
    statistics, _, rounded = collected(corpus, tmp_path / "rounded", **changes)
    fvu = np.square(rounded[3] - exact[3]).sum() / np.square(exact[3] - exact[3].mean(axis=0)).sum()
    assert statistics["sites"]["layers.3"]["added_fvu"] == pytest.approx(fvu, rel=1e-4)
    assert statistics["sites"]["layers.3"]["bound"] is None
    assert 1e-7 < fvu < 1e-4


def test_float16_is_refused_where_the_weights_cannot_rule_out_an_overflow(corpus, tmp_path):
    model = small_model("Olmo3")
    model.model.layers[2].post_feedforward_layernorm.weight.data[5] = 20000.0
    save_small_model("Olmo3", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    job = recipe(corpus, model__name=str(tmp_path / "model"), activations__layers=[1, 3], activations__dtype="float16",
                 saes=[{"layer": 1, "d_sae": 64, "k": 4}])
    with pytest.raises(UserError, match=r"float16 holds at most 65504, but the weights of .* allow 1\d+ at layers.3"):
        collect(job, "train", tmp_path / "store")
    collect(recipe(corpus, model__name=str(tmp_path / "model"), activations__layers=[1],
                   activations__dtype="float16", saes=[{"layer": 1, "d_sae": 64, "k": 4}]), "train", tmp_path / "below")


def test_float16_is_refused_where_a_value_overflows(corpus, tmp_path):
    model = small_model("Llama")
    model.model.layers[1].mlp.down_proj.weight.data[3] *= 1e6
    save_small_model("Llama", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    job = recipe(corpus, model__name=str(tmp_path / "model"), activations__layers=[0, 1], activations__dtype="float16",
                 saes=[{"layer": 0, "d_sae": 64, "k": 4}])
    with pytest.raises(UserError, match=r"layers\.1 has a value of [\d.e+]+, but float16 holds at most 65504"):
        collect(job, "train", tmp_path / "store")
    assert not segment_path(tmp_path / "store", "layer_01", 0).exists()
    assert not list((tmp_path / "store").rglob("*.tmp"))
