"""The release folder is complete and correct, is made whole or not at all, and is made once."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from olmoscope.errors import UserError
from olmoscope.pipeline import release_saes, report_saes
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import Finish, Recipe
from olmoscope.release import card
from olmoscope.release.build import build_release
from olmoscope.release.card import code, escape
from olmoscope.release.finished_run import read_run
from release_runs import LAYER_NORM, RAW, WIDTH, edit_json, make_out, make_run, recipe_for_tests, synthetic_rows


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_and_manifest(built):
    release = built / "release"
    files = contents(release)
    per_sae = ("cfg.json", "evaluation.json", "report.html", "sae_weights.safetensors", "training.log")
    assert set(files) == {"README.md", "manifest.json", "report.html", "saelens_pretrained_saes.yaml",
                          *(f"{sae_id}/{name}" for sae_id in (RAW, LAYER_NORM) for name in per_sae)}
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["files"] == {name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
                                 for name, content in files.items()}
    assert [sae["id"] for sae in manifest["saes"]] == [RAW, LAYER_NORM]
    assert manifest["saes"][0]["metrics"] == {
        "held_out": {"rows": 512, "zero_rows": 0, "nmse": 0.2, "fvu": 0.3, "explained_variance": 0.7, "cosine": 0.9,
                     "l0": {"mean": 3.9}, "dead": {"share": 0.03125, "window": 512},
                     "intervals": {"nmse": [0.19, 0.21]},
                     "language": {"rows": 512, "predictions": 500, "ce_clean": 3.0, "ce_spliced": 3.25, "ce_zero": 8.0,
                                  "ce_mean": 7.0, "delta_ce": 0.25, "loss_recovered_zero": 0.95,
                                  "loss_recovered_mean": 0.9375, "kl": 0.125, "intervals": {"delta_ce": [0.2, 0.3]}}},
        "training": {"nmse": 0.25, "l0": 3.875, "steps": 8, "tokens": 4096,
                     "dead": {"share": 0.0625, "window": 1000}}}
    assert manifest["saes"][1]["hf_hook_name"] == "model.layers.7"
    assert manifest["saes"][0]["provenance"]["date"] == "2026-01-01T00:00:00+00:00"
    assert manifest["sources"] == {"modules": {"documents": 30, "tokens": 3000},
                                   "questions": {"documents": 10, "tokens": 1000}}
    assert Recipe.model_validate(manifest["recipe"]) == recipe_for_tests()
    assert yaml.safe_load(files["saelens_pretrained_saes.yaml"]) == {"olmoscope-tiny-saes": {
        "repo_id": "your-name/olmoscope-tiny-saes", "model": "tiny", "conversion_func": None,
        "links": {"publication": "https://huggingface.co/your-name/olmoscope-tiny-saes"},
        "saes": [{"id": sae_id, "path": sae_id, "l0": 3.9, "variance_explained": 0.7, "neuronpedia": None}
                 for sae_id in (RAW, LAYER_NORM)]}}


def test_weights_are_not_stored_twice(out):
    build_release(out)
    for sae_id in (RAW, LAYER_NORM):
        name = "sae_weights.safetensors"
        assert (out / "release" / sae_id / name).samefile(out / "runs" / sae_id / "sae" / name)


def test_building_again_changes_nothing(out):
    first = build_release(out)
    assert first.written and first.folder == out / "release" and first.saes == [RAW, LAYER_NORM]
    before = {path: path.stat().st_ino for path in out.rglob("*")}
    second = build_release(out)
    assert not second.written and second.saes == first.saes
    assert {path: path.stat().st_ino for path in out.rglob("*")} == before


def test_the_same_runs_give_the_same_bytes_elsewhere(copy, tmp_path):
    before = contents(copy / "release")
    elsewhere = shutil.copytree(copy, tmp_path / "else" / "where")
    shutil.rmtree(elsewhere / "release")
    build_release(elsewhere)
    assert contents(elsewhere / "release") == before


@pytest.mark.parametrize("name", ["README.md", "manifest.json", f"{RAW}/cfg.json", f"{RAW}/sae_weights.safetensors"])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_damaged_release_is_made_again(out, name, in_place):
    build_release(out)
    before = contents(out / "release")
    path = out / "release" / name
    damaged = path.read_bytes().replace(b"a", b"b")
    if name == "manifest.json":
        damaged = path.read_bytes().replace(b"modules", b"modular")
    if not in_place:
        path.unlink()
    path.write_bytes(damaged)
    assert build_release(out).written
    assert contents(out / "release") == before
    assert not build_release(out).written


def test_another_evaluation_makes_another_release(out):
    build_release(out)
    edit_json(out / "runs" / RAW / "evaluation.json", lambda tree: tree.update(nmse=0.125))
    assert build_release(out).written
    assert "| 0.125000 |" in (out / "release" / "README.md").read_text()


def test_a_process_that_dies_leaves_the_old_release(out, monkeypatch):
    build_release(out)
    before = contents(out / "release")
    edit_json(out / "runs" / RAW / "evaluation.json", lambda tree: tree.update(nmse=0.125))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("model_card", "release_manifest", "_same"):
        with monkeypatch.context() as patch:
            patch.setattr(f"olmoscope.release.build.{name}", die)
            with pytest.raises(KeyboardInterrupt):
                build_release(out)
        assert contents(out / "release") == before
    assert build_release(out).written
    assert sorted(path.name for path in out.iterdir()) == ["recipe.yaml", "release", "runs"]


def test_a_process_that_dies_between_the_renames_is_made_good(out, monkeypatch):
    build_release(out)
    before = contents(out / "release")
    (out / "release").rename(out / ".release.old")
    assert build_release(out).written
    assert contents(out / "release") == before
    assert sorted(path.name for path in out.iterdir()) == ["recipe.yaml", "release", "runs"]


def test_what_somebody_else_put_there_is_not_lost(out):
    build_release(out)
    (out / "release" / ".git").mkdir()
    (out / "release" / ".git" / "config").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that do not belong to the release \(\.git/config\)"):
        build_release(out)
    assert (out / "release" / ".git" / "config").read_text() == "mine"


def test_two_at_once_are_refused(out):
    from olmoscope.files import locked
    with locked(out / ".release.building", "building the release"), pytest.raises(UserError, match="another process"):
        build_release(out)


def test_what_is_not_ready_is_named_with_the_command(out):
    def refused(*saying: str) -> None:
        with pytest.raises(UserError) as caught:
            build_release(out)
        assert all(text in str(caught.value) for text in saying), str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (out / "release").exists()

    log = out / "runs" / RAW / "training.log"
    log.unlink()
    refused("training.log is missing")
    log.write_text("8 steps\n")
    evaluation = out / "runs" / RAW / "evaluation.json"
    edit_json(evaluation, lambda tree: tree["l0"].pop("mean"))
    refused("evaluation.json: l0.mean: Field required")
    evaluation.unlink()
    refused(RAW, "not evaluated", f"olmoscope evaluate {out}")
    (out / "runs" / LAYER_NORM / "done.json").unlink()
    refused(LAYER_NORM, "not trained to the end", f"olmoscope train {out}")
    shutil.rmtree(out / "runs")
    refused(RAW, LAYER_NORM, f"olmoscope train {out}")


def test_runs_of_another_recipe_are_refused(out):
    other = recipe_for_tests(train__lr="0.5")
    shutil.rmtree(out / "runs" / RAW)
    make_run(out / "runs" / RAW, other, 0, synthetic_rows(WIDTH))
    with pytest.raises(UserError, match="holds a run of another recipe"):
        build_release(out)
    assert not (out / "release").exists()


def links(page: Path) -> list[Path]:
    return [(page.parent / address).resolve() for address in re.findall(r'<a href="([^"]+)"', page.read_text())]


def test_reports_of_a_release_link_to_its_card_and_to_each_other(built):
    release = built / "release"
    card, common, own = (release / name for name in ("README.md", "report.html", f"{RAW}/report.html"))
    assert links(common) == [release / f"{RAW}/report.html", release / f"{LAYER_NORM}/report.html", card]
    assert links(own) == [common, card]
    assert all(path.is_file() for path in links(common) + links(own))


def test_reports_of_runs_link_to_the_card_once_there_is_one(out):
    report_saes(load_recipe(str(out / "recipe.yaml")), out)
    common, own = out / "report.html", out / "runs" / RAW / "report.html"
    assert links(own) == [common]
    release_saes(out)
    assert links(own) == [common, out / "release" / "README.md"] and out / "release" / "README.md" in links(common)
    before = common.stat().st_ino
    assert not release_saes(out).written and common.stat().st_ino == before


def test_card(built):
    page = (built / "release" / "README.md").read_text()
    head, _, body = page.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(head)["library_name"] == "saelens"
    rows = [line.strip("|").split("|") for line in body.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in row] for row in rows]
    figures = ["0.200000", "0.7000", "0.2500", "95.00%", "0.1250", "3.90", "3.12%", "0.250000"]
    assert [f"`{RAW}`", "layers.3", "96", "4", "none", *figures, "yes"] in table
    assert [f"`{LAYER_NORM}`", "layers.7", "96", "4", "layer norm", *figures, ""] in table
    assert ["modules", "30", "3,000", "75.0%"] in table
    assert "`hidden_states[8]` are" in body and f"Here this concerns `{LAYER_NORM}`" in body
    assert "512 held-out rows" in " ".join(body.split())
    assert "`layer norm` SAEs centre" in body and "SAEs centre" not in card.model_card([read_run(built / "runs" / RAW)])
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", body, flags=re.S)):
        compile(block, f"block {number} of the card", "exec")
    assert f"`hidden_states[{8}]`" in body and body.count("```") == 6
    assert f"olmoscope index your-name/olmoscope-tiny-saes:{RAW} --text FILE --out features\n" in body


def test_the_card_says_what_else_training_did(built):
    run, other = (read_run(built / "runs" / name) for name in (RAW, LAYER_NORM))
    train = run.recipe.train.model_copy(update={"finish": Finish(share=0.075), "axes": "principal", "orthogonal": 0.8})
    changed = replace(run, recipe=run.recipe.model_copy(update={"train": train}))
    sentences = ("In the last 7.5% of the steps, the loss also included the change in the language model's predictions "
                 "when it gets reconstructions", "Adam worked along the principal axes of the activations",
                 "Similar rows of the decoder were moved apart")
    plain, alone, both = (" ".join(card.model_card(runs).split()) for runs in ([run], [changed], [changed, other]))
    for sentence in sentences:
        assert sentence not in plain and f"{sentence}." in alone and f"{sentence} (1 of 2 SAEs)." in both


@pytest.mark.parametrize("widths, tokens, inside", [
    ((32, 64), (100_000, 140_000), True), ((16, 31), (100_000, 140_000), False), ((32, 64), (140_001, 200_000), False)])
def test_the_card_says_where_settings_are_extrapolated(built, monkeypatch, widths, tokens, inside):
    monkeypatch.setattr(card, "TESTED_WIDTHS", widths)
    monkeypatch.setattr(card, "TESTED_TOKENS", tokens)
    text = card.model_card([read_run(built / "runs" / RAW)])
    said = "within these sizes." if inside else "outside these sizes, so the rules are extrapolated."
    assert f"These SAEs (Olmo3ForCausalLM, d_model 32, 140,000 tokens) are {said}" in text


def test_names_from_a_recipe_are_text_in_the_card(tmp_path):
    """Pipes, tags, links and line ends in a name change neither the tables nor the markup."""
    evil = "a|b`<script>alert(1)</script>[x](http://evil)\n# Title"
    out = make_out(tmp_path / "out")

    def rename(tree: dict) -> None:
        tree["store"]["model"]["name"] = evil
        tree["store"]["sources"][evil] = {"documents": 1, "tokens": 1}

    for sae_id in (RAW, LAYER_NORM):
        edit_json(out / "runs" / sae_id / "done.json", rename)
    build_release(out)
    card = (out / "release" / "README.md").read_text()
    assert "\n# Title" not in card
    (row,) = [line for line in card.splitlines() if line.startswith("| a")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 5
    assert row.startswith(r"| a\|b\`\<script\>alert(1)\</script\>\[x\](http://evil) \# Title |")
    assert code("a`b") == "``a`b``" and code("`") == "`` ` ``" and code("a|b") == r"`a\|b`"
    assert escape("a&b *c* _d_") == r"a&amp;b \*c\* \_d\_"


@pytest.mark.parametrize("path, line", [
    ("/home/someone/SmolLM2-135M-Instruct",
     "name = 'SmolLM2-135M-Instruct'  # the folder that `olmoscope fetch-model smollm2` makes"),
    ("/home/someone/model", "name = 'model'  # the model's folder")])
def test_a_folder_of_this_machine_is_called_by_its_name(built, path, line):
    run = read_run(built / "runs" / RAW)
    model = run.done.store.model.model_copy(update={"name": path})
    store = run.done.store.model_copy(update={"model": model})
    text = card.model_card([replace(run, done=run.done.model_copy(update={"store": store}))])
    assert "/home" not in text and f"\n{line}\n" in text and f"The SAEs are for `{Path(path).name}`." in text


def test_a_model_and_datasets_of_the_hub_are_linked(tmp_path):
    recipe = recipe_for_tests(
        text__sources="[{kind: dolma, name: web, url_list: 'hf://datasets/allenai/dolma/urls/v1_6-sample.txt'},"
                      " {kind: chat, name: chats, repo: allenai/Dolci-Instruct-SFT}]",
        text__mixture="{web: 0.5, chats: 0.5}")
    out = make_out(tmp_path / "out", recipe)
    commit = "0123456789abcdef0123456789abcdef01234567"
    for sae in recipe.saes:
        edit_json(out / "runs" / sae.id / "done.json", lambda tree: tree["store"]["model"].update(
            name="allenai/Olmo-3-7B-Think", revision=commit))
    build_release(out)
    card = (out / "release" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "allenai/Olmo-3-7B-Think"
    assert head["datasets"] == ["allenai/dolma", "allenai/Dolci-Instruct-SFT"]
    assert f"from_pretrained(name, revision='{commit}', dtype=torch.bfloat16)" in card
    entry = yaml.safe_load((out / "release" / "saelens_pretrained_saes.yaml").read_text())["olmoscope-tiny-saes"]
    assert entry["links"]["model"] == "https://huggingface.co/allenai/Olmo-3-7B-Think"
    config = json.loads((out / "release" / RAW / "cfg.json").read_text())
    assert config["metadata"]["dataset_path"] == "allenai/dolma, allenai/Dolci-Instruct-SFT"


def test_the_pages_are_of_the_sae_and_of_all(built):
    release = built / "release"
    pages = [(folder / "report.html").read_text() for folder in (release, release / RAW)]
    assert [LAYER_NORM in page for page in pages] == [True, False]
    assert all(RAW in page and "0.2000" in page for page in pages)
    assert "](report.html)" in (release / "README.md").read_text()
