"""Cards of a report, for figures that no tiny run gives: many active latents, nothing that fired, no ablation cost."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from olmoscope.evaluate import cards
from olmoscope.evaluate.cards import POINTS, Shown, TrainingLine
from olmoscope.evaluate.report import report_page
from olmoscope.evaluate.results import Evaluation
from release_runs import evaluation, recipe_for_tests


def shown(number=1, training=(), **changes):
    figures = evaluation(recipe_for_tests().saes[0], "0123", 32)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = figures
        for key in parents:
            node = node[key]
        node[int(last) if isinstance(node, list) else last] = value
    return Shown(number, f"SAE {number}", Evaluation.model_validate(figures), training)


def tips(card):
    return [title.text for title in ElementTree.fromstring(str(card.drawing)).iter("title")]


def test_a_wide_l0_is_put_into_few_bins_that_hold_all_rows():
    card = cards.sparsity_cards([shown(rows=3000, l0__values=list(range(0, 6000, 2)), l0__rows=[1] * 3000)])[1]
    assert 20 <= len(tips(card)) <= 40
    assert tips(card)[0] == "0 to 149 active latents\n2.50%"
    assert sum(float(tip.split("\n")[1].rstrip("%")) for tip in tips(card)) == pytest.approx(100, abs=0.5)


def test_l0_of_few_values_has_a_bin_each_and_of_one_says_so():
    card = cards.sparsity_cards([shown()])[1]
    assert tips(card) == ["3 active latents\n9.96%", "4 active latents\n90.04%"]
    assert "exactly 0" in cards.sparsity_cards([shown(l0__values=[0], l0__rows=[512])])[1].note


def test_density_has_a_bar_for_what_never_fired_and_the_rest_by_share():
    assert tips(cards.sparsity_cards([shown()])[0]) == [
        "never fired\n3.12%", "fires on 1.00% to 10.00% of rows\n93.75%",
        "fires on 10.00% to 100.00% of rows\n3.12%"]
    nothing = cards.sparsity_cards([shown(density__latents=[96, 0, 0])])[0]
    assert tips(nothing)[0] == "never fired\n100.00%"


def test_a_long_run_is_drawn_in_means_of_equal_size():
    lines = [TrainingLine(100 * step, 1.0 + step % 2, 1e-3, 0.5) for step in range(1, 961)]
    card = cards.training_cards([shown(training=lines)])[0]
    assert len(tips(card)) == POINTS  # eight lines a point
    assert tips(card)[-1] == "tokens 96,000\n1.500"


def test_dead_latents_are_drawn_from_where_they_are_known():
    lines = [TrainingLine(100 * step, 1.0, 1e-3, None if step < 4 else 0.25) for step in range(1, 7)]
    card = cards.training_cards([shown(training=lines)])[1]
    assert tips(card) == ["tokens 400\n25.00%", "tokens 500\n25.00%", "tokens 600\n25.00%"]
    unknown = shown(2, training=lines[:3])
    assert len(tips(cards.training_cards([shown(1, training=lines), unknown])[1])) == 3
    card = cards.training_cards([unknown])[1]
    assert card.drawing == "" and card.note.endswith("Not known: training saw fewer tokens than that.")
    assert "None" not in report_page([unknown])


def test_rows_of_zeros_are_said_and_their_figures_left_out():
    zeros = {"rows": 12, "zero_rows": 12, "fvu": None, "explained_variance": None, "nmse": None, "cosine": None,
             "l2_ratio": None, "relative_reconstruction_bias": None, "l0": 0.0, "l1": 0.0, "intervals": {},
             "language": None}
    some = shown(zero_rows=12, subsets={"prompt": zeros}, by_position__0={
        "first": 0, "last": 0, "rows": 12, "norm": 0.0, "nmse": None}, by_norm=[
        {"low": 0.0, "high": 0.0, "rows": 12, "nmse": None, "share_of_error": 0.0, "share_of_variance": 0.0},
        {"low": 0.0, "high": 50.0, "rows": 500, "nmse": 0.2, "share_of_error": 1.0, "share_of_variance": 1.0}])
    page = report_page([some])
    assert "12, left out of NMSE, cosine and length ratio" in page
    assert page.count('<td><span class="none">none</span></td>') == 4 and "None" not in page
    drawn = {card.title: tips(card) for card in cards.place_cards([some])}
    assert len(drawn["Norm by position"]) == 2 and len(drawn["Error by position"]) == 1
    assert len(drawn["Error by norm"]) == 1
    assert "Rows of zeros" not in report_page([shown()])


def test_what_cannot_be_had_is_left_out_and_said():
    """If zeros cost nothing, loss recovered is unknown."""
    language = {"language__loss_recovered_zero": None, "language__loss_recovered_mean": None}
    assert [card.title for card in cards.model_cards([shown(1, **language), shown(2, **language)])] == [
        "Added cross-entropy", "KL divergence"]
    one, both = report_page([shown(**language)]), report_page([shown(1, **language), shown(2, **language)])
    assert "zero ablation costs nothing here" in one
    for page in (one, both):
        assert '<td><span class="none">none</span></td>' in page and "None" not in page and "NaN" not in page


def test_an_sae_that_does_better_than_none_or_worse_than_zeros_is_drawn():
    card = cards.model_cards([shown(1, language__delta_ce=-0.1, language__loss_recovered_zero=-2.0), shown(2)])
    assert tips(card[0])[0].startswith("A  SAE 1: -0.1000") and tips(card[1])[0].startswith("A  SAE 1: -200.00%")


def test_models_are_named_where_they_differ():
    def heads(page):
        return re.findall(r"<th[^>]*>([^<]*)</th>", page.split("</thead>")[0])

    assert "model" not in heads(report_page([shown(1), shown(2)]))
    other = report_page([shown(1), shown(2, model="other", text__tokens_hash="x")])
    assert "model" in heads(other) and "not measured on the same tokens" in other


def test_probing_and_absorption_have_rows_of_their_own_where_they_were_measured():
    probes = {"auc": 0.91, "accuracy": 0.8, "intervals": {"auc": [0.88, 0.94]}}
    probing = {"source": "tables", "tables": ["one"], "activations": probes | {"auc": 0.99},
               "latents": {1: probes, 5: probes | {"auc": 0.95, "intervals": {}}}}
    absorption = {"identity": "x", "words": 10, "left_out": 0, "letters": [], "counted": 3, "fraction": 0.25,
                  "full": None, "latents": 1.5, "intervals": {"fraction": [0.1, 0.4]}}
    measured, bare = shown(1, probing=probing, absorption=absorption), shown(2)
    text = report_page([measured])
    rows = dict(re.findall(r'<tr data-figure="((?:probing|absorption)_\w+)">.*?<td>(.*?)</td>', text, flags=re.S))
    assert list(rows) == ["probing_1", "probing_5", "probing_activations", "absorption_fraction", "absorption_full",
                          "absorption_latents"]
    assert "0.88" in rows["probing_1"] and "interval" not in rows["probing_5"] and "none" in rows["absorption_full"]
    assert "interval" in rows["absorption_fraction"] and "interval" not in rows["absorption_latents"]
    both = report_page([measured, bare])
    assert both.count('data-figure="probing_1"') == 1 and "data-figure=\"probing" not in report_page([bare])
