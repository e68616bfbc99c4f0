"""`olmoscope inspect`: one screen for an SAE, a set, a release, the registry; one line for what is wrong."""

import sys
from pathlib import Path

import pytest

import foreign_files as made
from olmoscope.cli import app as cli
from olmoscope.sae.io import coverage
from olmoscope.sae.io.registry import in_release, registered

FOREIGN = Path(__file__).parents[1] / "foreign"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run it in this process; returns standard output and standard error, spaces as one."""
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
                  "site layers.15", "p = (0.8 x) W_enc + b_enc", "z = p where over the threshold",
                  "out = (z W_dec + b_dec) / 0.8", "of 1024 tokens, begin with BOS", "checkpoints/final.safetensors,",
                  "float32, read as float32", "unusual its threshold is of codes in the rows' own scale"):
        assert words in out, out
    assert not err


def test_what_nothing_says_is_asked_for(run, tmp_path):
    npz = tmp_path / "google/gemma-scope-2b-pt-res" / made.gemma_scope(tmp_path)
    npz.rename(tmp_path / "alone")
    out, _ = run(tmp_path / "alone")
    assert "model not said: give --model" in out and "site not said: give --site" in out
    assert "site layers.4" in run(tmp_path / "alone", "--site", "4")[0]


def test_sets(run):
    out, _ = run(FOREIGN / "sparsify")
    assert "holds 5 SAEs; look at one of them: olmoscope inspect" in out
    assert "holds 32 SAEs" in run("saelens:llama_scope_lxr_8x")[0]


def test_the_registry(run, monkeypatch):
    """tests/sae/io/test_address.py reads all of it."""
    few = [registered(address) for release in ("goodfire-llama-3.1-8b-instruct", "temporal-sae-llama-3.1-8b")
           for address in in_release(f"saelens:{release}")]
    monkeypatch.setattr(coverage, "entries", lambda: iter(few))
    out, _ = run("saelens:")
    assert "temporal not read 1 2" in out and "goodfire Goodfire SAE 1 1" in out
    assert "1 of 3 dictionaries (33.33%) are in a format that is read." in out


def test_mistakes(run, tmp_path):
    assert "error: saelens:no-such: SAELens' registry has no release 'no-such'" in run("saelens:no-such")[1]
    assert "is no folder or file, no hub id (OWNER/NAME:PATH/IN/REPO), and no saelens:RELEASE/ID" in run("nowhere")[1]
    (tmp_path / "some.txt").write_text("no SAE")
    assert "some.txt is damaged: it is no file of safetensors, numpy or torch" in run(tmp_path / "some.txt")[1]
