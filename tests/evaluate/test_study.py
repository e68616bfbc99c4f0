"""Runs compared by setting: means and spread over seeds, frontiers, study.json, the table, the report."""

import json
import shutil
import statistics
from dataclasses import replace

import pytest

from commands import run_forked as olmoscope
from helpers import recipe, write_documents
from olmoscope import api
from olmoscope.cli.study_tables import show_study
from olmoscope.errors import UserError
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.report import report_of_folders, write_report
from olmoscope.evaluate.results import read_evaluation
from olmoscope.evaluate.stability import compare_latents
from olmoscope.evaluate.study import Spread, study_of, study_of_training
from olmoscope.features.rows_of import index_sae
from olmoscope.pipeline import collect_stores, compare_seeds, evaluate_saes, report_saes, train_saes
from olmoscope.recipe.load import load_recipe
from olmoscope.sae.io.checkpoint import read_alive
from olmoscope.sae.io.open import find_saes, open_sae
from olmoscope.train.checkpoint import checkpoints
from olmoscope.train.run import run_folder

COLUMNS = {"NMSE", "FVU", "L0", "dead", "ΔCE", "rec.", "KL"}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two rates by three seeds at one layer, and a run at another; trained, evaluated."""
    folder = tmp_path_factory.mktemp("study")
    write_documents(folder / "corpus", count=90)
    (folder / "job.yaml").write_text(recipe(folder / "corpus", tokens__count=1500, train__checkpoints={"every": 5},
                                            saes=[{"layer": 1, "d_sae": 256, "k": 4},
                                                  {"layer": 7, "d_sae": 256, "k": 4}]).to_yaml())
    job = load_recipe(str(folder / "job.yaml"), overrides=["saes.0.train={lr: [1e-3, 2e-3], seed: [0, 1, 2]}"])
    collect_stores(job, folder / "out")
    list(train_saes(job, folder / "out", []))
    list(evaluate_saes(job, folder / "out", []))
    report_saes(job, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def job(out):
    return load_recipe(str(out / "recipe.yaml"))


def test_settings_seeds_means_and_spreads(out, job):
    study = study_of(job, out)
    assert [(setting.name, len(setting.runs)) for setting in study.settings] == [
        ("layer_01/width_256/topk_4_raw_lr-1e-3", 3), ("layer_01/width_256/topk_4_raw_lr-2e-3", 3),
        ("layer_07/width_256/topk_4_raw", 1)]
    assert [run.seed for run in study.settings[0].runs] == [0, 1, 2]
    assert [setting.varies for setting in study.settings] == [
        {"sae.layer": 1, "train.lr": 1e-3}, {"sae.layer": 1, "train.lr": 2e-3}, {"sae.layer": 7, "train.lr": None}]
    assert study.seeds and study.compares and not study.missing and study.same_text
    first = [read_evaluation(run_folder(out, sae) / "evaluation.json") for sae in job.saes[:3]]
    for key, value in (("nmse", lambda e: e.nmse), ("dead", lambda e: e.dead.share), ("kl", lambda e: e.language.kl)):
        values = [value(one) for one in first]
        spread = study.settings[0].figures[key]
        assert (spread.mean, spread.sd, spread.n) == (statistics.mean(values), statistics.stdev(values), 3)
    assert study.settings[2].figures["nmse"].sd is None and study.settings[2].figures["nmse"].n == 1


def test_the_frontier_is_of_a_layer_and_by_the_means(out, job):
    slow, fast, deep = study_of(job, out).settings
    better = min((slow, fast), key=lambda setting: setting.figures["fvu"].mean)
    assert {setting.name for setting in (slow, fast) if setting.unbeaten["fvu"]} == {better.name}
    assert deep.unbeaten == {"fvu": True, "delta_ce": True}


def test_study_json_says_it_all(out, job):
    tree = json.loads((out / "study.json").read_text())
    study = study_of(job, out)
    assert [one["setting"] for one in tree["settings"]] == [setting.name for setting in study.settings]
    assert tree["settings"][0]["figures"]["fvu"] == vars(study.settings[0].figures["fvu"])
    assert [(one["run"], one["seed"]) for one in tree["runs"]] == [
        (run.id, run.seed) for setting in study.settings for run in setting.runs]
    assert tree["runs"][0]["nmse"] == study.settings[0].runs[0].figures["nmse"]
    assert (tree["format"], tree["version"], tree["missing"]) == ("olmoscope study", 1, [])


def test_the_command_says_it_again_and_changes_nothing(out):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*")
              if path.is_file() and ".lock" not in path.name}
    done = olmoscope("study", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("topk_4_raw_lr") == 2 and "±" in done.stdout and "seed-0" not in done.stdout
    assert set(done.stdout.split()) >= COLUMNS and max(map(len, done.stdout.splitlines()[:14])) <= 80
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert "topk_4_raw_lr-1e-3_seed-0" in olmoscope("study", out, "--runs").stdout
    evaluated = olmoscope("evaluate", out).stdout
    assert evaluated.count("nothing to do") == 7 and "Settings" in evaluated and "--runs" in evaluated
    trained = olmoscope("train", out).stdout
    assert "Settings, in training" in trained and trained.count("nothing to do") == 7


def test_what_training_says(out, job):
    study = study_of_training(job, out)
    done = [json.loads((run_folder(out, sae) / "done.json").read_text()) for sae in job.saes[:3]]
    assert study.settings[0].figures["nmse"].mean == statistics.mean(one["nmse"] for one in done)
    assert study.settings[0].unbeaten == {}


def test_the_report_compares_settings(page, out, job):
    page.goto((out / "report.html").as_uri())
    rows = page.get_by_test_id("settings").locator("tbody tr").all()
    study = study_of(job, out)
    assert [row.locator("td").first.inner_text().split("\n") for row in rows] == [
        [str(number), setting.name] for number, setting in enumerate(study.settings, 1)]
    assert [row.locator("td").nth(1).inner_text() for row in rows] == ["3", "3", "1"]
    cell = rows[0].locator("td").nth(2).inner_text().split("\n")
    assert float(cell[0]) == pytest.approx(study.settings[0].figures["nmse"].mean, rel=1e-3)
    assert float(cell[1].removeprefix("± ")) == pytest.approx(study.settings[0].figures["nmse"].sd, rel=1e-3)
    assert "±" not in rows[2].inner_text()
    titles = page.locator("figure h3").all_inner_texts()
    assert titles[:2] == ["FVU against L0, by setting", "ΔCE against L0, by setting"]
    assert page.get_by_test_id("overview").locator("tbody tr").count() == 7


def test_advice_on_l0_is_in_the_table_and_in_the_report(page, out, job, tmp_path, capsys):
    """Advice needs settings that differ only in k. This study has none, so its first setting represents three."""
    study = study_of(job, out)
    first = study.settings[0]
    planted = [replace(first, name=f"k-{k}", varies={"sae.k": k, "sae.layer": 1}, figures={
        **first.figures, "l0": Spread(k, 0.0, 3), "decoder_cosine": Spread(cosine, 0.001, 3)})
        for k, cosine in ((8.0, 0.08), (16.0, 0.06), (32.0, 0.07))]
    show_study(replace(study, settings=planted))
    assert "the mean |cosine| of decoder directions is smallest at L0 16" in " ".join(capsys.readouterr().out.split())
    folders = [run_folder(out, sae) for sae in job.saes[:3]]
    write_report(tmp_path / "report.html", report_of_folders(folders), replace(study, settings=planted))
    page.goto((tmp_path / "report.html").as_uri())
    assert "is smallest at L0 16" in page.get_by_test_id("l0-advice").inner_text()
    page.goto((out / "report.html").as_uri())
    assert page.get_by_test_id("l0-advice").count() == 0


def test_runs_without_figures_are_named(out, job, tmp_path):
    (run_folder(tmp_path, job.saes[0])).mkdir(parents=True)
    with pytest.raises(UserError, match=r"no run of .* is evaluated yet; run `olmoscope evaluate"):
        study_of(job, tmp_path)
    path = run_folder(out, job.saes[0]) / "evaluation.json"
    (run_folder(tmp_path, job.saes[0]) / "evaluation.json").write_bytes(path.read_bytes())
    study = study_of(job, tmp_path)
    assert study.missing == [sae.id for sae in job.saes[1:]] and not study.compares
    (tmp_path / "recipe.yaml").write_text(job.to_yaml())
    done = olmoscope("study", tmp_path)
    assert done.returncode == 1 and "nothing to compare" in done.stderr and "Traceback" not in done.stderr


def test_names_of_the_users_own_are_called_by_what_varies(out, job, tmp_path):
    named = job.model_copy(update={"saes": [sae.model_copy(update={"name": name}) for sae, name in
                                            zip(job.saes, ["a", "b", "c", "d", "e", "f", "g"], strict=True)]})
    for old, new in zip(job.saes, named.saes, strict=True):
        run_folder(tmp_path, new).mkdir(parents=True)
        (run_folder(tmp_path, new) / "evaluation.json").write_bytes(
            (run_folder(out, old) / "evaluation.json").read_bytes())
    assert [setting.name for setting in study_of(named, tmp_path).settings] == [
        "layer_01/width_256/topk_4_raw_lr-1e-3", "layer_01/width_256/topk_4_raw_lr-2e-3", "g"]


def test_kept_checkpoints_are_evaluated_and_indexed(out, job, tmp_path):
    run = run_folder(out, job.saes[0])
    places = find_saes(str(run / "checkpoints"))
    assert [open_sae(place).step for place in places] == [5, 10, 12]
    found = evaluate_anywhere([str(run / "checkpoints")], Options(tmp_path / "steps", tokens=300))
    assert [one.name for one in found] == [f"{job.saes[0].id}@{step}" for step in (5, 10, 12)]
    errors = [read_evaluation(one.folder / "evaluation.json") for one in found]
    assert errors[0].nmse > errors[1].nmse > errors[2].nmse and len({one.run_hash for one in errors}) == 3
    assert not any(one.fresh for one in evaluate_anywhere(places, Options(tmp_path / "steps", tokens=300)))
    assert index_sae(places[0], device="cpu").folder == run / "index-step-00000005"
    for place, message in ((run / "checkpoints" / "step-00000006.safetensors", "does not exist"),
                           (tmp_path / "checkpoints" / "step-00000006.safetensors", "is not a run folder")):
        if place.is_relative_to(tmp_path):
            place.parent.mkdir()
            place.write_bytes(b"")
        with pytest.raises(UserError, match=message):
            open_sae(place)


def test_seeds_are_compared_once(page, out, job, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    out, names = tmp_path / "out", [sae.id for sae in job.saes]
    assert json.loads((out / "study.json").read_text())["settings"][0]["stability"] is None
    first = olmoscope("evaluate", out, "--stability")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count(": compared\n") == 6 and "MMCS" in first.stdout
    shown = first.stdout[first.stdout.index("The same latents from another seed"):first.stdout.index("A row for each")]
    assert shown.count("topk_4_raw_lr") == 2 and max(map(len, shown.splitlines())) <= 80
    slow, _, deep = study_of(job, out).settings
    assert [pair.runs for pair in slow.pairs] == [(names[0], names[1]), (names[0], names[2]), (names[1], names[2])]
    for pair in slow.pairs:
        saes = [open_sae(out / "runs" / run).sae for run in pair.runs]
        alive = [read_alive(checkpoints(out / "runs" / run)[-1], job.train.dead_window) for run in pair.runs]
        assert pair.latents == tuple(int(one.sum()) for one in alive)
        assert compare_latents(*saes, *alive) == pair.model_dump(include={"matched_share", "matched_share_decoder",
                                                                          "mmcs"})
    values = [pair.mmcs for pair in slow.pairs]
    spread = slow.stability["mmcs"]
    assert (spread.mean, spread.sd, spread.n) == (statistics.mean(values), statistics.stdev(values), 3)
    assert deep.stability is None
    tree = json.loads((out / "study.json").read_text())
    assert tree["settings"][0]["stability"]["figures"]["mmcs"] == vars(spread)
    assert tree["settings"][0]["stability"]["pairs"][0]["runs"] == names[:2] and not tree["settings"][2]["stability"]
    assert not any(fresh for _, fresh in compare_seeds(job, out))
    assert "MMCS" in olmoscope("study", out).stdout and json.loads((out / "study.json").read_text()) == tree
    page.goto((out / "report.html").as_uri())
    heads = page.get_by_test_id("settings").locator("th").all_inner_texts()
    cells = page.get_by_test_id("settings").locator("tbody tr").first.locator("td").all_inner_texts()
    assert float(cells[heads.index("MMCS")].split()[0]) == pytest.approx(spread.mean, rel=1e-3)

    kept = json.loads((out / "stability.json").read_text())  # as if one run had been trained again
    kept["pairs"][0]["hashes"][0] = "another"
    (out / "stability.json").write_text(json.dumps(kept))
    assert study_of(job, out).settings[0].stability is None
    assert [fresh for _, fresh in compare_seeds(job, out)] == [True, False, False, False, False, False]
    (out / "stability.json").write_text('{"pairs": [{}]}')
    with pytest.raises(UserError, match=r"stability.json: pairs\.0\.runs: Field required; delete it and run"):
        study_of(job, out)


def test_what_cannot_be_compared_is_said(out, job, tmp_path):
    refused = olmoscope("evaluate", out, "--stability", "--only", job.saes[0].id)
    assert refused.returncode == 1 and "give one output folder" in refused.stderr and "Traceback" not in refused.stderr
    with pytest.raises(UserError, match="is not an output folder, and stability is for one"):
        api.evaluate(run_folder(out, job.saes[0]), stability=True)
    path = run_folder(tmp_path, job.saes[0]) / "evaluation.json"
    path.parent.mkdir(parents=True)
    path.write_bytes((run_folder(out, job.saes[0]) / "evaluation.json").read_bytes())
    with pytest.raises(UserError, match=r"has no two such runs that are evaluated; give an SAE of the recipe a list"):
        list(compare_seeds(job, tmp_path))


def test_alive_is_what_training_says(out, job):
    for sae in job.saes[:2]:
        path, done = checkpoints(run_folder(out, sae))[-1], json.loads((run_folder(out, sae) / "done.json").read_text())
        alive, ever = (read_alive(path, window) for window in (done["dead_window"], 10**9))
        assert done["dead_share"] == pytest.approx(float((~alive).double().mean()))
        assert len(alive) == sae.d_sae and alive.sum() < ever.sum() and bool((ever | ~alive).all())
