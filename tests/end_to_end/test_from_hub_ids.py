"""From hub ids alone: every command against a hub on this machine, from an empty cache, a filled one, and offline.

The model's branch moves in between: work that was started with a commit continues with it.
"""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from helpers import recipe, save_small_model, small_model, write_documents
from hub_endpoint import COMMIT, NEXT, HubEndpoint
from olmoscope.activations.store.format import read_manifest
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.features.format import read_info
from olmoscope.files import sha256
from run_commands import run_commands

SAE = "layer_01/width_64/topk_4_raw"


def hashes(folder):
    return {path.relative_to(folder): sha256(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def revision(out, split="train"):
    return read_manifest(out / "store" / split).model.revision


def chats(folder, count=40):
    folder.mkdir(parents=True)
    rows = [[{"role": "user", "content": f"What is word{number}?"},
             {"role": "assistant", "content": f"word{number} is " * 20}] for number in range(count)]
    for part in range(2):
        pq.write_table(pa.table({"messages": rows[part::2]}), folder / f"train-0000{part}-of-00015.parquet")


@pytest.fixture
def hub(tmp_path):
    """A model with two commits (`main` is the first) and two data sets."""
    save_small_model("Llama", tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    small_model("Llama", seed=1).save_pretrained(tmp_path / "second")
    chats(tmp_path / "chats" / "data")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text("".join(
        json.dumps({"text": f"A text of the hub, number {number}, about word{number % 7}. " * 8}) + "\n"
        for number in range(60)))
    with HubEndpoint() as hub:
        hub.add("model", "lab/base", tmp_path / "first")
        hub.add("dataset", "lab/chats", tmp_path / "chats")
        hub.add("dataset", "lab/texts", tmp_path / "texts")
        yield hub


def job(path, source, **changes):
    tree = recipe(path.parent, model__name="lab/base", activations__layers=[1], tokens__count=1500,
                  text__sources=[source | {"name": "web"}], saes=[{"layer": 1, "d_sae": 64, "k": 4}], **changes)
    path.write_text(tree.to_yaml())
    return path


def test_every_command_from_hub_ids(hub, tmp_path):
    environment = hub.environment(tmp_path / "hf") | {"OLMOSCOPE_CACHE": str(tmp_path / "cache")}
    chat = job(tmp_path / "chat.yaml", {"kind": "chat", "repo": "lab/chats", "files": "data/*.parquet",
                                        "format": "chatml"})
    streamed = job(tmp_path / "streamed.yaml", {"kind": "hub", "repo": "lab/texts"})
    out = tmp_path / "out"
    stages = [("collect", chat, "-o", out), ("train", out), ("evaluate", out), ("index", out / "runs" / SAE),
              ("release", out)]
    run_commands([*stages, ("collect", streamed, "-o", tmp_path / "streamed")], environment)
    run_folder = out / "runs" / SAE
    assert revision(out) == revision(out, "held_out") == revision(tmp_path / "streamed") == COMMIT
    assert read_evaluation(run_folder / EVALUATION).model_revision == COMMIT
    assert read_info(run_folder / "index").model.revision == COMMIT
    assert f"from_pretrained(name, revision='{COMMIT}'" in (out / "release" / "README.md").read_text()
    config = json.loads((out / "release" / SAE / "cfg.json").read_text())
    assert config["metadata"]["model_revision"] == COMMIT
    assert any(request.startswith("GET /elsewhere/models/lab/base/") for request in hub.requests)

    # The branch moves. Work in progress stays with its commit; new work takes the new one.
    hub.add("model", "lab/base", tmp_path / "second", commit=NEXT)
    hub.add("model", "lab/saes", out / "release")
    before = hashes(out)
    run_commands(stages, environment)
    assert hashes(out) == before
    shutil.rmtree(out / "store" / "held_out")
    shutil.rmtree(run_folder / "index")
    (run_folder / EVALUATION).unlink()
    downloaded = hub.requests.count(f"GET /elsewhere/models/lab/base/resolve/{COMMIT}/model.safetensors")
    sae = f"lab/saes:{SAE}"
    some = ("--text", "lab/texts", "--tokens", 500)
    run_commands([*stages[:-1], ("evaluate", sae, *some, "-o", tmp_path / "evaluation"),
                  ("index", sae, *some, "-o", tmp_path / "index"), ("collect", chat, "-o", tmp_path / "new")],
                 environment)
    assert hashes(out) == before
    (evaluation,) = (tmp_path / "evaluation").glob(f"*/{EVALUATION}")
    assert read_evaluation(evaluation).model_revision == COMMIT == read_info(tmp_path / "index").model.revision
    assert revision(tmp_path / "new") == revision(tmp_path / "new", "held_out") == NEXT
    assert hub.requests.count(f"GET /elsewhere/models/lab/base/resolve/{COMMIT}/model.safetensors") == downloaded == 1

    # Offline, everything comes from the cache and gives the same bytes.
    asked = len(hub.requests)
    shutil.rmtree(out / "store" / "held_out")
    (run_folder / EVALUATION).unlink()
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    some = ("--text", tmp_path / "texts", "--tokens", 500)
    run_commands([*stages, ("collect", chat, "-o", tmp_path / "offline"),
                  ("evaluate", sae, *some, "-o", tmp_path / "evaluation offline"),
                  ("index", sae, *some, "-o", tmp_path / "index offline")], offline)
    assert len(hub.requests) == asked
    assert hashes(out) == before
    assert hashes(tmp_path / "offline" / "store") == hashes(tmp_path / "new" / "store")
    (evaluation,) = (tmp_path / "evaluation offline").glob(f"*/{EVALUATION}")
    assert read_evaluation(evaluation).model_revision == COMMIT == read_info(tmp_path / "index offline").model.revision


@pytest.mark.parametrize("form", ["default", "reference"])
def test_the_reference_recipes(form, tmp_path):
    """With a random Olmo 3 of 32 layers and width 32, and few tokens."""
    config = small_model("Olmo3").config
    config.num_hidden_layers, config.layer_types = 32, config.layer_types * 8
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(save_small_model("Olmo3", tmp_path / "model"))
    chats(tmp_path / "dolci" / "data")
    write_documents(tmp_path / "dolma")
    (tmp_path / "dolma" / "urls").mkdir()
    (tmp_path / "dolma" / "urls" / "v1_6-sample.txt").write_text("hf://datasets/allenai/dolma/shard.json.gz\n")
    out = tmp_path / "out"
    small = ["tokens.count=1500", "tokens.held_out=300", "tokens.chunk_lengths=[[20, 60]]", "tokens.segment_rows=1000",
             "tokens.batch_tokens=256", "text.held_out_share=0.2", "model.d_model=32", "model.compile=false",
             "model.dtype=float32", "device=cpu", "evaluate.tokens=100",
             *(f"saes.{number}.{key}={value}" for number, k in enumerate([4, 4, 4, 4, 4, 8, 8])
               for key, value in (("d_sae", 64), ("k", k)))]
    collect = ["collect", "olmo3-7b-think", "--form", form, "-o", out, *(each for pair in small
                                                                         for each in ("--set", pair))]
    with HubEndpoint() as hub:
        hub.add("model", "allenai/Olmo-3-7B-Think", tmp_path / "model")
        hub.add("dataset", "allenai/Dolci-Instruct-SFT", tmp_path / "dolci")
        hub.add("dataset", "allenai/dolma", tmp_path / "dolma")
        environment = hub.environment(tmp_path / "hf") | {"OLMOSCOPE_CACHE": str(tmp_path / "cache")}
        run_commands([collect, ("train", out), ("evaluate", out), ("release", out)], environment)
    manifest = json.loads((out / "release" / "manifest.json").read_text())
    assert (len(manifest["saes"]), manifest["model"]["revision"]) == (7, COMMIT)
    assert revision(out) == revision(out, "held_out") == COMMIT
    for path in out.rglob(EVALUATION):
        assert read_evaluation(path).model_revision == COMMIT
    assert {path.name for path in (tmp_path / "hf" / "hub").glob("*--*")} == {
        "models--allenai--Olmo-3-7B-Think", "datasets--allenai--Dolci-Instruct-SFT", "datasets--allenai--dolma"}
    assert COMMIT in (out / "release" / "README.md").read_text()
