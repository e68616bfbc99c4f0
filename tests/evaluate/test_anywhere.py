"""`olmoscope evaluate SAE...` as a user runs it: SAEs of several kinds and places, killed, and run again."""

import json
import os
import shutil
import signal
import time
from importlib import resources

import pytest
import torch
from safetensors import safe_open

from commands import run_forked, shared_commands
from olmoscope.errors import UserError
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.files import sha256
from olmoscope.model.dtype import fast_dtype
from olmoscope.release.build import build_release
from release_runs import LAYER_NORM, RAW, make_out

D = 256  # the width of the model in the package


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = make_out(tmp_path_factory.mktemp("anywhere") / "out", d_model=D)
    build_release(out)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some short modules of this package, and a chat."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("errors.py", "units.py", "seeds.py", "progress.py"):
        (folder / name).write_text(resources.files("olmoscope").joinpath(name).read_text())
    chat = ("<|im_start|>user\nWhat is a list?<|im_end|>\n<|im_start|>assistant\n<think>They ask about lists.</think>"
            "A list is a mutable sequence of items.<|im_end|>\n")
    (folder / "chat.txt").write_text(chat * 5)
    return folder


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A gated SAE, by sae-lens itself."""
    from sae_lens import GatedSAE, GatedSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(model_name="tiny", hook_name="blocks.3.hook_resid_post", prepend_bos=False, context_size=64)
    folder = tmp_path_factory.mktemp("gated") / "gated"
    sae = GatedSAE(GatedSAEConfig(d_in=D, d_sae=96, metadata=metadata))
    sae.save_model(folder)
    return folder


def test_several_kinds_side_by_side(out, gated, text, hub_endpoint, tmp_path):
    hub_endpoint.add("model", "someone/saes", out / "release")
    environment = hub_endpoint.environment(tmp_path / "hf") | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    hub = f"someone/saes:{LAYER_NORM}"
    asked = (out / "runs" / RAW, gated, hub, "--text", text, "--tokens", 5000, "--out", tmp_path / "out")
    done = run_forked("evaluate", *asked, environment=environment, hub=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith((" layer_03", " gated", " someone"))]
    assert len(rows) == 3, done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80 or "evaluated, " in done.stdout
    folders = {"layer_03_width_96_topk_4_raw": "topk", "gated": "gated",
               "someone_saes_layer_07_width_96_topk_4_layernorm": "topk"}
    for folder, architecture in folders.items():
        found = read_evaluation(tmp_path / "out" / folder / EVALUATION)
        assert 1000 < found.rows < 5000  # all of the text
        assert (found.architecture, found.language.rows, found.model) == (architecture, found.rows, "tiny")
        assert found.text.kind == "text"
        read = {"gated": gated, "someone_saes_layer_07_width_96_topk_4_layernorm": out / "release" / LAYER_NORM}
        assert found.files == (None if folder not in read else {
            name: sha256(read[folder] / name) for name in ("sae_weights.safetensors", "cfg.json")})
        assert {"prompt", "thinking", "answer"} <= set(found.subsets)
        assert sum(found.subsets[name].rows for name in ("prompt", "thinking", "answer")) < found.rows
        assert found.subsets["without_special"].rows < found.rows
        assert (tmp_path / "out" / folder / "report.html").exists()
    assert (tmp_path / "out" / "report.html").exists()
    again = run_forked("evaluate", *asked, environment=environment, hub=True)
    assert again.stdout.count("already evaluated, nothing to do") == 3
    assert [line for line in again.stdout.splitlines() if line.startswith((" layer_03", " gated", " someone"))] == rows
    # In another precision of the model it is another evaluation; a run and its release's folder are the same SAE.
    other = "float32" if fast_dtype(torch.device("cpu")) == "bfloat16" else "bfloat16"
    fresh = evaluate_anywhere([str(gated), str(out / "runs" / RAW), str(out / "release" / RAW)], Options(
        tmp_path / "out", str(text), 5000, dtype=other))
    assert all(one.fresh for one in fresh)
    named = {"sae", "run_hash", "files", "identity"}
    run, release = (read_evaluation(one.folder / EVALUATION).model_dump(exclude=named) for one in fresh[1:])
    assert run == release


SLOWLY = """
import sys
from pathlib import Path
from olmoscope.evaluate import kept
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
kept.SAVE_SECONDS = 0.0
evaluate_anywhere(sys.argv[3:], Options(Path(sys.argv[1]), sys.argv[2], 1500, batch_tokens=64))
"""


@pytest.mark.parametrize("phase", ["survey", "language"])
def test_killed_and_gone_on_with_it_is_the_same_bit_for_bit(out, gated, text, tmp_path, phase):
    subjects = [str(out / "runs" / LAYER_NORM), str(gated)]
    whole = evaluate_anywhere(subjects, Options(tmp_path / "whole", str(text), 1500, batch_tokens=64))
    commands = shared_commands()
    pid, _, _ = commands.start_as(os.environ, tmp_path / "killed", text, *subjects, code=SLOWLY)
    path, limit = tmp_path / "killed" / f".unfinished-{phase}-00.safetensors", time.monotonic() + 200
    while not (path.exists() and steps_of(path) > 0):
        assert commands.wait(pid, 0) is None, "it ended before it was killed"
        assert time.monotonic() < limit
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    commands.wait(pid)
    steps = steps_of(path)
    assert not list((tmp_path / "killed").glob("*/evaluation.json"))
    again = evaluate_anywhere(subjects, Options(tmp_path / "killed", str(text), 1500, batch_tokens=64))
    assert steps > 0
    for one, other in zip(whole, again, strict=True):
        assert (one.folder / EVALUATION).read_bytes() == (other.folder / EVALUATION).read_bytes()
    assert not list((tmp_path / "killed").glob(".unfinished*"))


def steps_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["olmoscope"])["steps"]


def refused(message, names, options):
    with pytest.raises(UserError, match=message):
        evaluate_anywhere([str(name) for name in names], options)


def test_what_does_not_fit_is_refused(out, gated, text, tmp_path):
    options = Options(tmp_path / "out", str(text), 600)
    refused("was named twice", [gated, gated], options)
    refused("no file or folder of that name", [gated], Options(tmp_path / "out", "no-such-text"))
    refused("give --text", [gated], Options(tmp_path / "out"))
    refused("has no held-out tokens yet", [gated], Options(tmp_path / "out", str(out)))
    narrow = make_out(tmp_path / "narrow") / "runs" / RAW
    refused("an SAE of another model", [narrow], options)
    odd = shutil.copytree(gated, tmp_path / "odd")
    config = json.loads((odd / "cfg.json").read_text())
    config["metadata"] |= {"prepend_bos": True}
    (odd / "cfg.json").write_text(json.dumps(config))
    refused("odd was trained on sequences that begin with BOS, .* evaluate them separately", [gated, odd], options)
    refused("the tokenizer of 'tiny' has no BOS token", [odd], options)
    config["metadata"] |= {"model_name": None}
    (odd / "cfg.json").write_text(json.dumps(config))
    refused("give --model", [odd], options)
    (tmp_path / "empty").mkdir()
    refused("has no files", [gated], Options(tmp_path / "out", str(tmp_path / "empty")))
