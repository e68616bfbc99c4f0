"""`olmoscope store` as a user runs it: what it prints, exit codes, one line for every mistake."""

import shutil

import pytest

from commands import run_forked as olmoscope
from helpers import recipe, write_documents
from olmoscope.pipeline import collect_stores


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store commands")
    write_documents(folder / "corpus", count=60)
    collect_stores(recipe(folder / "corpus", tokens__count=1200), folder / "out")
    return folder / "out"


def test_info(whole):
    ran = olmoscope("store", "info", whole)
    assert ran.returncode == 0, ran.stderr
    for part in ("finished", "Olmo3ForCausalLM", "sha256:", "1,200 tokens of", "bytes of layer_07", "torch"):
        assert part in ran.stdout


@pytest.mark.slow
def test_damage_verified_repaired_collected(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    assert olmoscope("store", "verify", out).returncode == 0
    damaged = out / "store" / "train" / "layer_01" / "segment-000001.safetensors"
    sound = damaged.read_bytes()
    damaged.write_bytes(sound[:-1])

    ran = olmoscope("store", "verify", out)
    assert ran.returncode == 1
    assert "layer_01/segment-000001.safetensors: truncated" in ran.stdout
    assert f"Run: olmoscope store repair {out}" in ran.stdout
    ran = olmoscope("store", "repair", "--dry-run", out)
    assert ran.returncode == 0 and damaged.exists()
    assert f"would delete {damaged}" in ran.stdout
    ran = olmoscope("store", "repair", out)
    assert ran.returncode == 0 and not damaged.exists()
    assert f"Then run: olmoscope collect {out}\n" in ran.stdout

    assert olmoscope("collect", out).returncode == 0
    assert damaged.read_bytes() == sound
    assert olmoscope("store", "verify", out).returncode == 0


@pytest.mark.slow
def test_what_cannot_be_mended_fails(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "store" / "train" / "mine.txt").write_text("mine")
    assert olmoscope("store", "verify", out).returncode == 1
    ran = olmoscope("store", "repair", out)
    assert ran.returncode == 1
    assert "mine.txt: not a file of a store (left unchanged)" in ran.stdout
    (out / "store" / "train" / "manifest.json").write_text('{"format": "olmoscope activation store", "version": 99}')
    for command in ("verify", "repair"):
        ran = olmoscope("store", command, out)
        assert ran.returncode == 1 and "has store format 99" in ran.stdout
    ran = olmoscope("store", "info", out)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1


def test_no_store_is_one_line(tmp_path):
    for path, message in ((tmp_path / "nothing", "does not exist"), (tmp_path, "holds no activation store")):
        ran = olmoscope("store", "verify", path)
        assert ran.returncode == 1 and ran.stdout == ""
        assert ran.stderr.startswith("error: ") and message in ran.stderr and ran.stderr.count("\n") == 1
