"""Evaluation of an output folder: on its stored rows and, for the language model, on the first of its tokens."""

import pytest

from helpers import recipe, write_documents
from olmoscope.cli.behaviour_tables import show_behaviour
from olmoscope.evaluate import evaluate, first_letter, kept
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.behaviour import Behaviour
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.pipeline import collect_stores, evaluate_saes, train_saes
from olmoscope.train.run import run_folder


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    corpus = write_documents(tmp_path_factory.mktemp("corpus"), count=90).parent
    return recipe(corpus, tokens__count=1500, tokens__segment_rows=256, model__dtype="float32",
                  activations__dtype="float32", evaluate={"tokens": 300})


@pytest.fixture(scope="module")
def out(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("on store") / "out"
    collect_stores(job, out)
    list(train_saes(job, out, []))
    list(evaluate_saes(job, out, []))
    return out


def paths(job, out):
    return [run_folder(out, sae) / EVALUATION for sae in job.saes]


def test_stored_rows_and_the_models_own_give_the_same_figures(job, out, tmp_path):
    """In float32 the store holds the model's rows. Both measure all 500 rows; on a store, the model reads only 300."""
    for one in map(read_evaluation, paths(job, out)):
        assert (one.rows, one.language.rows, one.text.kind) == (500, 300, "store")
        assert one.nmse < one.nmse_random_directions
        assert sum(each.rows for each in one.by_position) == sum(each.rows for each in one.by_norm) == 500
        assert 300 - one.language.predictions < 20  # the last token of each sequence
        assert one.subsets["without_first"].rows < 500
    runs = [str(path.parent) for path in paths(job, out)]
    whole = evaluate_anywhere(runs, Options(tmp_path, tokens=500, dtype="float32"))
    for store, text in zip(map(read_evaluation, paths(job, out)),
                           (read_evaluation(one.folder / EVALUATION) for one in whole), strict=True):
        assert (text.rows, text.text.kind, text.run_hash) == (500, "text", store.run_hash)
        for name in ("fvu", "nmse", "cosine", "l2_ratio", "l1"):
            assert getattr(text, name) == pytest.approx(getattr(store, name), rel=1e-5), name
            assert text.intervals[name] == pytest.approx(store.intervals[name], rel=1e-5), name
        assert text.l0 == store.l0
        assert text.subsets["ordinary"].nmse == pytest.approx(store.subsets["ordinary"].nmse, rel=1e-5)
    first = evaluate_anywhere(runs, Options(tmp_path, tokens=300, dtype="float32"))
    for store, text in zip(map(read_evaluation, paths(job, out)),
                           (read_evaluation(one.folder / EVALUATION) for one in first), strict=True):
        assert text.language.predictions == store.language.predictions
        for name in ("ce_clean", "ce_spliced", "ce_zero", "kl", "kl_zero"):  # the mean is of other rows
            assert getattr(text.language, name) == pytest.approx(getattr(store.language, name), rel=1e-5), name


def test_again_is_nothing_to_do_and_other_settings_are_another_evaluation(job, out):
    before = [path.read_bytes() for path in paths(job, out)]
    assert [fresh for _, fresh in evaluate_saes(job, out, [])] == [False, False]
    paths(job, out)[0].unlink()
    assert [fresh for _, fresh in evaluate_saes(job, out, [])] == [True, False]
    assert [path.read_bytes() for path in paths(job, out)] == before
    other = job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"tokens": 200})})
    assert [fresh for _, fresh in evaluate_saes(other, out, [job.saes[1].id])] == [True]
    assert read_evaluation(paths(job, out)[1]).language.rows == 200
    list(evaluate_saes(job, out, []))
    assert [path.read_bytes() for path in paths(job, out)] == before


@pytest.mark.parametrize("stop_after", [2, 4])  # steps: three segments of stored rows, then batches of the model
def test_stopped_and_gone_on_with_it_is_the_same_bit_for_bit(job, out, monkeypatch, stop_after):
    before = [path.read_bytes() for path in paths(job, out)]
    for path in paths(job, out):
        path.unlink()
    monkeypatch.setattr(kept, "SAVE_SECONDS", 0.0)
    done, save = [], kept.KeptSums.save

    def stop(self, *arguments):
        save(self, *arguments)
        done.append(arguments)
        if len(done) == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(kept.KeptSums, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            list(evaluate_saes(job, out, []))
    assert list(out.glob(".unfinished-*"))
    assert [fresh for _, fresh in evaluate_saes(job, out, [])] == [True, True]
    assert [path.read_bytes() for path in paths(job, out)] == before
    assert not list(out.glob(".unfinished-*"))


def test_rows_at_once_do_not_matter(job, out, monkeypatch):
    before = list(map(read_evaluation, paths(job, out)))
    for path in paths(job, out):
        path.unlink()
    monkeypatch.setattr(evaluate, "ROWS_AT_ONCE", 7)
    list(evaluate_saes(job, out, []))
    for one, other in zip(before, map(read_evaluation, paths(job, out)), strict=True):
        for name in ("fvu", "nmse", "cosine", "l1"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6), name
        assert one.l0 == other.l0


def test_behaviour_of_all_runs(job, out, tmp_path, monkeypatch, capsys):
    """This must be the last test in this file, since it adds to the evaluations."""
    monkeypatch.setattr(first_letter, "WORDS", 12)
    rows = "".join(f"the {'cat' if number % 2 else 'dog'} of row {number},{number % 2}\n" for number in range(240))
    (tmp_path / "animals.csv").write_text(f"prompt,target\n{rows}")
    before = [read_evaluation(path) for path in paths(job, out)]
    wanted = Behaviour(True, None, tmp_path, absorption=True)
    assert [fresh for _, fresh in evaluate_saes(job, out, [], wanted)] == [False, False]
    found = [read_evaluation(path) for path in paths(job, out)]
    for one, other in zip(before, found, strict=True):
        assert other.probing.tables == ["animals"] and 0 <= other.probing.latents[16].auc <= 1
        assert len(other.absorption.letters) == 26
        assert other.model_copy(update={"probing": None, "absorption": None}) == one
    show_behaviour(found)
    printed = capsys.readouterr().out
    assert "Sparse probing" in printed and "Absorption of first letters" in printed
    assert "Means over 1 labelled table" in printed and max(map(len, printed.splitlines())) <= 80
