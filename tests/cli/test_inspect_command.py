"""`olmoscope inspect`: one screen for an SAE, a set, a release or the registry; one line for a mistake."""

import sys
from pathlib import Path

import pytest
import torch

import foreign_files as made
from olmoscope.cli import app as cli
from olmoscope.errors import UserError
from olmoscope.sae.io import coverage, saelens
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.io.registry import in_release, registered
from olmoscope.sae.topk import TopK

FOREIGN = Path(__file__).parents[1] / "foreign"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run it in this process; returns standard output and standard error, with single spaces."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["olmoscope", "inspect", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as exit_:
            assert exit_.code in (0, None, 1)
        out, err = capsys.readouterr()
        return " ".join(out.split()), " ".join(err.split())
    return call


def test_an_sae_on_one_screen(run, tmp_path):
    made.llama_scope(tmp_path)
    out, err = run(tmp_path / "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x")
    for words in ("format Llama Scope SAE", "jumprelu, 48 latents, width 16", "model meta-llama/Llama-3.1-8B",
                  "site layers.15", "p = (0.8 x) W_enc + b_enc", "z = p where p > threshold",
                  "out = (z W_dec + b_dec) / 0.8", "1,024 tokens, with BOS", "checkpoints/final.safetensors,",
                  "weights float32 files", "notes its threshold is for rows in their own scale"):
        assert words in out, out
    assert not err


def test_a_transcoder(run):
    out, _ = run(FOREIGN / "sparsify/skip/layers.1.mlp")
    for words in ("reads layers.1.mlp.in writes layers.1.mlp.out", "p = x W_enc + b_enc",
                  "out = z W_dec + b_dec + W_skip x", "256 tokens, BOS not stated", "../config.json, 39 bytes"):
        assert words in out, out


def test_what_nothing_says_is_asked_for(run, tmp_path):
    npz = tmp_path / "google/gemma-scope-2b-pt-res" / made.gemma_scope(tmp_path)
    npz.rename(tmp_path / "alone")
    out, _ = run(tmp_path / "alone")
    assert "model not stated (give --model)" in out and "site not stated (give --site)" in out
    assert "site layers.4" in run(tmp_path / "alone", "--site", "4")[0]


def test_a_saelens_folder_without_a_site(run, tmp_path):
    sae = TopK(torch.ones(3, 2), torch.ones(3, 2), torch.zeros(2), "none", torch.zeros(3), 2)
    saelens.write(sae, tmp_path / "sae", {"model_name": "tiny", "hook_name": None, "hf_hook_name": None,
                                          "prepend_bos": False, "l0": 2})
    out, err = run(tmp_path / "sae")
    assert "topk, k 2, 3 latents" in out and "site not stated (give --site)" in out and "published L0 2" in out
    assert not err
    assert "site layers.1" in run(tmp_path / "sae", "--site", "1")[0]
    with pytest.raises(UserError, match=r"does not say which site the SAE reads \(metadata.hook_name\); give --site"):
        open_sae(tmp_path / "sae")


def test_sets(run):
    out, _ = run(FOREIGN / "sparsify")
    assert "holds 5 SAEs. Inspect one of them: olmoscope inspect" in out
    out, _ = run(FOREIGN)  # of several formats
    assert "holds 20 SAEs" in out and "... and 8 more" in out
    assert "holds 32 SAEs" in run("saelens:llama_scope_lxr_8x")[0]


def test_the_registry(run, monkeypatch):
    """tests/sae/io/test_address.py reads all of it."""
    few = [registered(address) for release in ("goodfire-llama-3.1-8b-instruct", "temporal-sae-llama-3.1-8b")
           for address in in_release(f"saelens:{release}")]
    monkeypatch.setattr(coverage, "entries", lambda: iter(few))
    out, _ = run("saelens:")
    assert "temporal cannot be read 1 2" in out and "goodfire Goodfire SAE 1 1" in out
    assert "Olmoscope reads the format of 1 of 3 dictionaries (33.33%)." in out


def test_mistakes(run, tmp_path):
    assert "error: saelens:no-such: SAELens' registry has no release 'no-such'" in run("saelens:no-such")[1]
    assert ("nowhere does not exist, and is neither an address on the hub (OWNER/NAME:PATH/IN/REPO) nor "
            "saelens:RELEASE/ID") in run("nowhere")[1]
    (tmp_path / "some.txt").write_text("no SAE")
    assert "some.txt is damaged or not a file of safetensors, numpy or torch" in run(tmp_path / "some.txt")[1]
