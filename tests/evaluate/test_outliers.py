"""Rows of outlier norm: figures without them, and the cost of splicing if they stay unchanged."""

import pytest
import torch
from markupsafe import escape

from helpers import recipe, write_documents
from olmoscope.cli.tables import show_evaluations
from olmoscope.evaluate import subsets
from olmoscope.evaluate.cards import Shown, outliers_said
from olmoscope.evaluate.evaluate import Setting, evaluate_on_text
from olmoscope.evaluate.figures import FVU, NMSE, groups_of
from olmoscope.evaluate.report import report_page
from olmoscope.evaluate.sequences import read_sequences
from olmoscope.model.splice import load_causal_lm
from olmoscope.pipeline import collect_stores, train_saes
from olmoscope.sae.io.open import open_sae
from olmoscope.tokens.tokenizer import load_tokenizer
from olmoscope.train.run import run_folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=90)
    job = recipe(folder / "corpus", activations={"layers": [3]}, saes=[{"layer": 3, "d_sae": 256, "k": 4}])
    collect_stores(job, folder / "out")
    list(train_saes(job, folder / "out", []))
    model = load_causal_lm(job.model, torch.device("cpu"), job.activations.sites)
    sequences = read_sequences(folder / "out" / "store" / "held_out", load_tokenizer(job.model), apart=False, stored=())
    return job, open_sae(run_folder(folder / "out", job.saes[0])), model, sequences


def evaluated(trained, folder):
    _, opened, model, sequences = trained
    found, = evaluate_on_text([opened], model, Setting(sequences, sequences.rows, 256, "a text", "float32", folder))
    return found


def test_outliers_kept_is_a_hook_that_leaves_them_alone(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(subsets, "OUTLIER", 1.02)
    found = evaluated(trained, tmp_path)
    assert 10 < found.outliers < found.rows / 2
    _, opened, model, sequences = trained
    losses = {"clean": [], "spliced": [], "kept": []}

    def put(kept):
        def hook(module, arguments, output):
            x = output[0] if isinstance(output, tuple) else output
            y = opened.sae.reconstruct(x)[0]
            if kept:
                y = torch.where(x.double().norm(dim=-1, keepdim=True) > found.text.outlier_norm, x, y)
            return (y, *output[1:]) if isinstance(output, tuple) else y
        return hook

    for number in range(len(sequences.starts) - 1):
        first, end = sequences.starts[number : number + 2]
        ids = torch.from_numpy(sequences.token_ids[first:end]).long()[None]
        for name, hooks in (("clean", []), ("spliced", [put(False)]), ("kept", [put(True)])):
            handles = [model.layers[3].register_forward_hook(hook) for hook in hooks]
            with torch.no_grad():
                logits = model.module(input_ids=ids, use_cache=False).logits[0, :-1].double()
            losses[name].append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
            for handle in handles:
                handle.remove()
    clean, spliced, kept = (float(torch.cat(parts).mean()) for parts in losses.values())
    assert found.language.delta_ce == pytest.approx(spliced - clean, abs=1e-4)
    assert found.language.delta_ce_outliers_kept == pytest.approx(kept - clean, abs=1e-4)
    assert found.language.ce_outliers_kept == pytest.approx(kept, abs=1e-4)
    assert 0 < found.language.kl_outliers_kept < found.language.kl
    assert found.language.intervals.keys() >= {"delta_ce_outliers_kept", "kl_outliers_kept"}


def test_figures_of_the_others_come_first_and_those_of_all_beside_them(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subsets, "OUTLIER", 1.02)
    found = evaluated(trained, tmp_path)
    rest = found.subsets["without_outliers"]
    assert (NMSE.value(found), FVU.value(found)) == (rest.nmse, rest.fvu) != (found.nmse, found.fvu)
    assert FVU.interval(found) == rest.intervals["fvu"]
    keys = {figure.key for _, figures in groups_of([found]) for figure in figures}
    assert keys >= {"fvu_all", "delta_ce_outliers_kept", "kl_outliers_kept"}
    show_evaluations([found])
    said = capsys.readouterr().out
    assert f"{found.outliers:,} of {found.rows:,} rows (" in " ".join(said.split()) and " kept " in said


def test_it_is_said_what_they_are(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(subsets, "OUTLIER", 1.02)
    found = evaluated(trained, tmp_path)
    _, _, model, sequences = trained
    outliers, first = [], 0
    for number in range(len(sequences.starts) - 1):
        start, end = sequences.starts[number : number + 2]
        ids = torch.from_numpy(sequences.token_ids[start:end]).long()[None]
        with torch.no_grad():
            x_TD = model.module(input_ids=ids, output_hidden_states=True).hidden_states[4][0].double()
        over_T = x_TD.norm(dim=1) > found.text.outlier_norm
        outliers.append(x_TD[over_T])
        first += int(over_T[0])
    x_ND = torch.cat(outliers)
    unit_ND = torch.nn.functional.normalize(x_ND, dim=1)
    like = found.outlier_rows
    assert like.first == first and len(x_ND) == found.outliers
    assert like.norm == pytest.approx(float(x_ND.norm(dim=1).mean()), rel=1e-5)
    mean_D = unit_ND.mean(0)
    assert like.alike == pytest.approx(float((unit_ND @ (mean_D / mean_D.norm())).mean()), abs=1e-5)
    said = outliers_said(found)
    assert said.startswith(f"{found.outliers:,} of {found.rows:,} rows (") and "on average" in said
    assert f"(mean cosine {like.alike:.2f}); with these rows replaced too" in said
    page = report_page([Shown(1, "one", found, [])])
    assert page.count(str(escape(said))) == 2  # above the charts, and among the facts
    before = found.model_copy(update={"outlier_rows": None})  # from an older file
    assert "cosine" not in outliers_said(before) and outliers_said(before).startswith(f"{found.outliers:,} of")


def test_without_outliers_nothing_is_said_of_them(trained, tmp_path, capsys):
    found = evaluated(trained, tmp_path)
    assert found.outliers == 0 and found.usual is found and found.outlier_rows is None
    assert outliers_said(found).startswith(f"none of {found.rows:,} rows has a norm over 10 times the median (")
    assert found.language.delta_ce_outliers_kept == found.language.delta_ce
    assert found.language.kl_outliers_kept == found.language.kl
    assert not [figure for _, figures in groups_of([found]) for figure in figures if figure.beside_outliers]
    show_evaluations([found])
    assert "outliers" not in capsys.readouterr().out
