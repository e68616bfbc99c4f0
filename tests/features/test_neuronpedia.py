"""Neuronpedia's layout: every column of its tables, figures equal to the index's."""

import numpy as np
import pytest
import torch

from feature_index import small_index
from neuronpedia_schema import read
from olmoscope.errors import UserError
from olmoscope.features import neuronpedia
from olmoscope.features.labels import LABELS_FILE, Labels
from olmoscope.features.neuronpedia import write_neuronpedia
from olmoscope.features.outgoing import directions
from olmoscope.features.read import FeatureIndex
from olmoscope.labelling.that_count import labels_that_count
from olmoscope.model.unembed import load_unembedding
from olmoscope.recipe.schema import Model


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return FeatureIndex(small_index(tmp_path_factory.mktemp("index")))


@pytest.fixture(scope="module")
def written(index, tmp_path_factory):
    labels = Labels(index.path / LABELS_FILE, 512)
    labels.write(3, "first thought", "", "me")
    labels.write(3, "second thought", "a note", "me")
    labels.write(4, "taken back", "", "me")
    labels.write(4, "", "", "me")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuronpedia, "BATCH", 200)
        made = write_neuronpedia(index, tmp_path_factory.mktemp("np"), labels_that_count(index), "some-model/res-512")
    return made, read(made.folder)


def test_every_row_has_the_columns_and_types_of_its_table(index, written):
    made, rows = written
    assert made.folder.parts[-3:] == ("v1", "some-model", f"{index.info.sae.layer}-res-512")
    assert [row["index"] for row in rows["Neuron"]] == [str(number) for number in range(512)]
    assert (made.features, made.activations, made.explanations) == (512, len(rows["Activation"]), 1)
    assert len({row["id"] for row in rows["Activation"]}) == made.activations
    (label,), (source,) = rows["Explanation"], rows["Source"]
    assert (label["index"], label["description"], label["notes"]) == ("3", "second thought", "a note")
    assert source["num_prompts"] == index.info.sequences
    for table in ("Neuron", "Activation", "Explanation"):
        assert {(row["modelId"], row["layer"]) for row in rows[table]} == {(source["modelId"], source["id"])}
    assert sorted(path.name for path in (made.folder / "features").iterdir()) == [
        f"batch-{number}.jsonl.gz" for number in range(3)]
    assert [path.name for path in (made.folder / "explanations").iterdir()] == ["batch-0.jsonl.gz"]


def test_figures_are_those_of_the_index(index, written):
    rows = written[1]
    W_FD, model = directions(index), Model(name=index.info.model.name, dtype="float32")
    unembedding = load_unembedding(model, torch.device("cpu"))
    dense_FT = np.zeros((512, index.info.tokens))
    for number in range(512):
        places, values = index.firing_values(number)
        dense_FT[number, places] = values
    kept_FT = dense_FT[:, index.corpus.kept_T > 0]
    with np.errstate(invalid="ignore"):
        pearson_FF = np.corrcoef(kept_FT)
    length_F = np.linalg.norm(kept_FT, axis=1)
    for number, row in enumerate(rows["Neuron"]):
        feature, fired_P = index.feature(number), index.firing_values(number)[1]
        assert (row["maxActApprox"], row["frac_nonzero"]) == (feature.max, feature.density)
        assert sum(row["freq_hist_data_bar_heights"]) == feature.rows
        if feature.rows:
            middles = row["freq_hist_data_bar_values"]
            assert middles[0] - float(fired_P.min()) == pytest.approx(feature.max - middles[-1])
        assert row["topkCosSimIndices"] == [one.feature for one in feature.neighbours]
        for name, ours in (("pos", feature.promoted), ("neg", feature.suppressed)):
            assert list(zip(row[f"{name}_str"], row[f"{name}_values"], strict=True)) == [
                (one.token.text, one.logit) for one in ours]
        found = dict(zip(row["correlated_features_indices"], row["correlated_features_pearson"], strict=True))
        assert set(found) == {one.feature for one in feature.companions}
        assert found == pytest.approx({other: pearson_FF[number, other] for other in found}, abs=1e-9)
        for other, cosine in zip(row["correlated_features_indices"], row["correlated_features_l1"], strict=True):
            wanted = kept_FT[number] @ kept_FT[other] / (length_F[number] * length_F[other])
            assert cosine == pytest.approx(wanted, rel=1e-6)
        aligned = row["neuron_alignment_indices"]
        assert row["neuron_alignment_values"] == W_FD[number, aligned].tolist()
        assert row["neuron_alignment_values"][0] == float(W_FD[number].max())
    logits_FV = unembedding.through_norm(W_FD) @ unembedding.U_VD[:len(index.tokens)].T
    for number, row in list(enumerate(rows["Neuron"]))[::50]:
        assert sum(row["logits_hist_data_bar_heights"]) == len(index.tokens)
        half = (row["logits_hist_data_bar_values"][1] - row["logits_hist_data_bar_values"][0]) / 2
        assert row["logits_hist_data_bar_values"][0] - half == pytest.approx(float(logits_FV[number].min()), abs=1e-4)


def test_examples_are_those_of_the_index(index, written):
    of_feature = {}
    for row in written[1]["Activation"]:
        of_feature.setdefault(int(row["index"]), []).append(row)
    for number in range(0, 512, 7):
        feature = index.feature(number)
        wanted = [(-1.0, feature.max, -1.0, one) for one in feature.top]
        wanted += [(interval.low, interval.high, interval.rows / index.info.rows, one)
                   for interval in reversed(feature.intervals) for one in interval.examples]
        assert len(wanted) == len(of_feature.get(number, []))
        for (low, high, share, example), row in zip(wanted, of_feature.get(number, []), strict=True):
            window = index.window(example)
            assert (row["binMin"], row["binMax"], row["binContains"]) == (low, high, share)
            assert row["values"] == window.activations and row["tokens"] == [one.text for one in window.tokens]
            assert row["values"][row["qualifyingTokenIndex"]] == example.value
            assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
            assert (row["minValue"], row["dataSource"]) == (min(row["values"]), window.source)


def test_again_it_is_the_same_byte_for_byte(index, written, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia, "BATCH", 200)
    folder = write_neuronpedia(index, tmp_path, labels_that_count(index), "some-model/res-512").folder
    for path in written[0].folder.rglob("*.*"):
        assert (folder / path.relative_to(written[0].folder)).read_bytes() == path.read_bytes()


def test_bad_input_is_named(index, tmp_path):
    with pytest.raises(UserError, match="--called Big: Neuronpedia wants MODEL/SET"):
        write_neuronpedia(index, tmp_path, {}, "Big")
    index.info.sae.__dict__["weights"] = "another"
    with pytest.raises(UserError, match=r"has changed since .* was made; run `olmoscope index` again"):
        write_neuronpedia(index, tmp_path, {})
