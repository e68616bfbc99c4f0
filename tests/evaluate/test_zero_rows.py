"""A model that gives rows of zeros, and one that gives NaN, from collection to figures, also for SAEs from anywhere."""

import json
import math

import pytest
import torch
import transformers

from helpers import recipe, save_small_model, write_documents
from olmoscope.cli.tables import show_evaluations
from olmoscope.errors import UserError
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.features.read import FeatureIndex
from olmoscope.features.rows_of import index_sae
from olmoscope.pipeline import collect_stores, evaluate_saes, train_saes
from olmoscope.sae.io import saelens
from olmoscope.sae.io.open import open_sae
from olmoscope.train.run import run_folder


def model_with(folder, value):
    """A Llama whose embedding of every token `word` is this value. A sequence's first token sees only itself, and
    nothing in a Llama adds a constant, so zeros stay zeros in every layer."""
    save_small_model("Llama", folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    word = transformers.AutoTokenizer.from_pretrained(folder)("word")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = value
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An output folder whose model gives rows of zeros, trained and evaluated."""
    folder = tmp_path_factory.mktemp("zeros")
    write_documents(folder / "corpus")
    job = recipe(folder / "corpus", model={"name": str(model_with(folder / "model", 0.0)), "dtype": "float32"},
                 activations={"layers": [3], "dtype": "float32"},
                 saes=[{"layer": 3, "d_sae": 64, "k": 4}, {"layer": 3, "d_sae": 64, "k": 4, "normalize": "layer_norm"}],
                 tokens__chunk_lengths=[(8, 16)])
    collect_stores(job, folder / "out")
    list(train_saes(job, folder / "out", []))
    list(evaluate_saes(job, folder / "out", []))
    return job, folder / "out"


def test_rows_of_zeros_are_counted_and_spoil_no_figure(out, capsys):
    job, out = out
    found = [read_evaluation(run_folder(out, sae) / EVALUATION) for sae in job.saes]
    for one in found:
        assert 0 < one.zero_rows < one.rows == 500
        assert one.zero_rows > one.subsets["without_first"].zero_rows == 0
        assert 0 < one.nmse < 2 and one.intervals["nmse"][0] < one.nmse < one.intervals["nmse"][1]
        done = json.loads((run_folder(out, job.saes[0]) / "done.json").read_text())
        assert 0 < done["nmse"] < 2, "training met such rows too"
    show_evaluations(found)
    said = capsys.readouterr().out
    assert f"{found[0].zero_rows} rows of layers.3 are all zeros: NMSE leaves them out." in said


def test_saes_from_anywhere_on_a_text_with_such_rows(out, tmp_path):
    job, out = out
    store = [read_evaluation(run_folder(out, sae) / EVALUATION) for sae in job.saes]
    runs = [str(run_folder(out, sae)) for sae in job.saes]
    for one, other in zip(store, evaluate_anywhere(runs, Options(tmp_path, tokens=500, dtype="float32")), strict=True):
        text = read_evaluation(other.folder / EVALUATION)
        assert (text.text.kind, text.rows, text.zero_rows) == ("text", 500, one.zero_rows)
        for name in ("nmse", "cosine", "l2_ratio", "fvu"):
            assert getattr(text, name) == pytest.approx(getattr(one, name), rel=1e-5), name


def test_features_are_indexed_over_such_rows(out):
    job, out = out
    for sae in job.saes:
        indexed = index_sae(str(run_folder(out, sae)), device="cpu")
        assert indexed.info.rows == 3000
        index = FeatureIndex(indexed.folder)
        for number in range(sae.d_sae):
            feature = index.feature(number)
            assert math.isfinite(feature.mean) and math.isfinite(feature.max), number


def test_rows_of_nan_are_refused_before_anything_is_measured(out, tmp_path):
    job, out = out
    broken = model_with(tmp_path / "broken", torch.nan)
    metadata = dict.fromkeys(("model_name", "hf_hook_name", "context_size", "prepend_bos", "dataset_path", "l0",
                              "num_dead_features"))
    saelens.write(open_sae(run_folder(out, job.saes[0])).sae, tmp_path / "sae",
                  metadata | {"hook_name": "blocks.3.hook_resid_post"})
    with pytest.raises(UserError, match=r"layers.3: [\d,]+ of [\d,]+ rows are NaN or infinite; try another") as caught:
        evaluate_anywhere([str(tmp_path / "sae")], Options(
            tmp_path / "out", text=str(out), tokens=500, dtype="float32", model=str(broken)))
    assert "\n" not in str(caught.value)
