"""Packing killed inside a document of many segments, with BOS: the finished tokens are always the same."""

import os
import signal
import time

import numpy as np
import pytest

from commands import Commands
from helpers import put_bos_first, recipe, save_small_model
from olmoscope.files import sha256


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A recipe file; its text is one document of some sixty segments."""
    folder = tmp_path_factory.mktemp("job")
    model = save_small_model("Llama", folder / "model")
    put_bos_first(model)
    (folder / "huge.txt").write_text(" ".join(f"word{(place * place) % 997} is" for place in range(25_000)))
    source = {"kind": "files", "name": "web", "paths": [str(folder / "*.txt")]}
    made = recipe(folder, text__sources=[source], text__held_out_share=0.0, tokens__count=40_000,
                  model__name=str(model), activations__layers=[0], saes=[{"layer": 0, "d_sae": 64, "k": 4}])
    (folder / "recipe.yaml").write_text(made.to_yaml())
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("outputs"))
    yield commands
    commands.close()


def tokens(out):
    return {path.name: sha256(path) for path in (out / "store" / "train" / "tokens").glob("segment-*")}


def test_kills_while_it_is_packed(job, commands, tmp_path):
    """The command ends at the held-out split, which this text lacks; by then the training store is complete."""
    status, output = commands.run("collect", job, "-o", tmp_path / "whole")
    assert status == 1 and "text.held_out_share is 0" in output
    want = tokens(tmp_path / "whole")
    assert len(want) > 50
    out, random = tmp_path / "killed", np.random.default_rng(0)
    for _ in range(6):
        before = len(tokens(out))
        pid, output = commands.start("collect", job, "-o", out)
        end = time.monotonic() + 30
        while len(list((out / "store" / "train" / "tokens").glob("segment-*"))) <= before:
            assert time.monotonic() < end and commands.wait(pid, 0.001) is None, output.read_text()
        commands.wait(pid, random.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert commands.wait(pid) == -signal.SIGKILL
        assert len(tokens(out)) < len(want), "it was packed before it was killed"
    status, output = commands.run("collect", job, "-o", out)
    assert tokens(out) == want, output
