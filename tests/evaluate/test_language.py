"""Cross-entropy and KL with a layer's output replaced: exact where possible, else equal to transformers in float64."""

import pytest
import torch

from helpers import save_small_model, small_model, streams
from olmoscope.evaluate import language
from olmoscope.evaluate.language import Divergence, LanguageSums, Replaced
from olmoscope.evaluate.subsets import SUBSETS, RowFacts
from olmoscope.model.splice import load_causal_lm
from olmoscope.recipe.schema import Model

LAYER, B, T = 2, 3, 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_small_model("Qwen3", tmp_path_factory.mktemp("Qwen3"))
    return load_causal_lm(Model(name=str(folder), dtype="float32"), torch.device("cpu"))


@pytest.fixture(scope="module")
def tokens_BT():
    return torch.randint(2, 4000, (B, T), generator=torch.Generator().manual_seed(0))


def next_of(tokens_BT):
    return torch.cat([tokens_BT[:, 1:], torch.full((B, 1), -1)], dim=1).flatten()


def measured(model, tokens_BT, replacement):
    """Language figures when a function of the layer's output replaces it."""
    place, = streams(model.layers, [LAYER])
    reading = model.read(tokens_BT, None, [place])
    x_BTD = reading.at[place.site]
    runs = [reading.hidden_BTD, *(model.go_on(place, new, reading)
                      for new in (replacement(x_BTD), torch.zeros_like(x_BTD), x_BTD.mean((0, 1)).expand_as(x_BTD)))]
    sums = LanguageSums(B)
    rows = torch.arange(B * T)
    facts = RowFacts(rows // T, rows % T, rows < 0, torch.zeros_like(rows))
    masks_SR = torch.zeros(len(SUBSETS), B * T, dtype=torch.bool)
    masks_SR[0] = True
    masks_SR[1] = rows % T == T - 1
    measured = Divergence(model, [run.flatten(0, 1) for run in runs], next_of(tokens_BT))
    sums.add(measured, Replaced(spliced=1, kept=1, zero=2, mean=3), facts, masks_SR)
    assert sums.subset("without_special") is None  # last tokens only: nothing is predicted
    return sums.subset("all")


def test_its_own_output_changes_nothing_at_all(model, tokens_BT):
    found = measured(model, tokens_BT, lambda x: x)
    assert found.ce_spliced == found.ce_clean
    assert (found.delta_ce, found.kl, found.loss_recovered_zero, found.loss_recovered_mean) == (0, 0, 1, 1)


def test_zeros_are_the_ablation_exactly(model, tokens_BT):
    found = measured(model, tokens_BT, torch.zeros_like)
    assert (found.ce_spliced, found.kl, found.loss_recovered_zero) == (found.ce_zero, found.kl_zero, 0)
    assert found.kl > 0


def test_equals_transformers_own_forward_in_float64(model, tokens_BT, monkeypatch):
    """They equal loss and KL by torch of the same model in float64 with a hook on the layer; ours go in chunks."""
    monkeypatch.setitem(language.LOGITS_AT_ONCE, "cpu", 7 * 4096)
    noise_BTD = torch.randn(B, T, model.d_model, generator=torch.Generator().manual_seed(1))
    found = measured(model, tokens_BT, lambda x: x + noise_BTD)
    whole = small_model("Qwen3").double()

    def run(change):
        handle = whole.model.layers[LAYER].register_forward_hook(lambda module, inputs, output: change(output))
        with torch.no_grad():
            result = whole(input_ids=tokens_BT, labels=tokens_BT, use_cache=False)
        handle.remove()
        return float(result.loss), torch.log_softmax(result.logits, dim=-1)

    clean, clean_BTV = run(lambda x: x)
    for name, change in {"spliced": lambda x: x + noise_BTD, "zero": torch.zeros_like,
                         "mean": lambda x: x.mean((0, 1)).expand_as(x)}.items():
        ce, log_BTV = run(change)
        assert getattr(found, f"ce_{name}") == pytest.approx(ce, rel=1e-5), name
        kl = torch.nn.functional.kl_div(log_BTV, clean_BTV, log_target=True, reduction="sum") / (B * T)
        assert getattr(found, "kl" if name == "spliced" else f"kl_{name}") == pytest.approx(float(kl), rel=1e-4), name
        if name != "spliced":
            assert getattr(found, f"loss_recovered_{name}") == pytest.approx(
                (ce - found.ce_spliced) / (ce - clean), rel=1e-2)
    assert found.ce_clean == pytest.approx(clean, rel=1e-5)
    assert found.delta_ce == pytest.approx(found.ce_spliced - clean, rel=1e-4)
    assert (found.rows, found.predictions) == (B * T, B * (T - 1))
    for name, (low, high) in found.intervals.items():
        assert low <= getattr(found, name) <= high, name
