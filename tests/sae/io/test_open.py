"""The same SAE can be opened from a run, from a folder in SAELens' format and from the hub."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from olmoscope.errors import UserError
from olmoscope.release.build import build_release
from olmoscope.release.export import export_run
from olmoscope.sae.io.open import find_saes, open_sae
from olmoscope.site import EMBED, Site
from release_runs import LAYER_NORM, RAW, WIDTH, make_out, synthetic_rows


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = make_out(tmp_path_factory.mktemp("subject") / "out")
    build_release(out)
    return out


def test_a_run_and_its_export_are_the_same_sae(out):
    run, folder = open_sae(out / "runs" / LAYER_NORM), open_sae(out / "release" / LAYER_NORM)
    x_BD = synthetic_rows(WIDTH)
    assert torch.equal(run.sae.reconstruct(x_BD)[0], folder.sae.reconstruct(x_BD)[0])
    assert (run.name, run.site, run.model_name, run.kind) == (LAYER_NORM, Site(7), "tiny", "run")
    assert (folder.site, folder.model_name, folder.kind, folder.architecture) == (Site(7), "tiny", "folder", "topk")
    assert run.bos == folder.bos == "no"
    assert run.context_size == folder.context_size == 512
    assert run.identity == json.loads((out / "runs" / LAYER_NORM / "done.json").read_text())["run_hash"]
    assert open_sae(str(export_run(out / "runs" / RAW).folder)).site == Site(3)


def test_an_argument_stands_for_all_that_is_in_it(out):
    runs = [str(out / "runs" / name) for name in (RAW, LAYER_NORM)]
    assert find_saes(str(out)) == runs
    assert find_saes(str(out / "release")) == [str(out / "release" / name) for name in (RAW, LAYER_NORM)]
    assert find_saes(runs[0]) == [runs[0]]
    assert find_saes("someone/some-saes:layer_03") == ["someone/some-saes:layer_03"]


HUB = """
import json, sys
from olmoscope.errors import UserError
from olmoscope.sae.io.open import open_sae
subject = open_sae(sys.argv[1])
print(json.dumps([subject.name, str(subject.site), subject.kind, subject.identity, float(subject.sae.W_dec.sum())]))
for name in sys.argv[2:]:
    try:
        open_sae(name)
    except UserError as error:
        print(json.dumps(str(error)))
"""


def test_from_the_hub(out, hub_endpoint, tmp_path):
    hub_endpoint.add("model", "someone/saes", out / "release")
    names = [f"someone/saes@main:{RAW}", "someone/saes:no/such/sae", "nobody/nothing:x"]
    done = subprocess.run([sys.executable, "-c", HUB, f"someone/saes:{RAW}", *names], capture_output=True, text=True,
                          env=hub_endpoint.environment(tmp_path / "hf"), timeout=120)
    assert done.returncode == 0, done.stderr
    opened, *errors = map(json.loads, done.stdout.splitlines())
    local = open_sae(out / "release" / RAW)
    assert opened == [f"someone/saes:{RAW}", "layers.3", "hub", local.identity, float(local.sae.W_dec.sum())]
    assert len(errors) == 2
    assert errors[0].startswith("cannot get no/such/sae from hub repository someone/saes: it has no such file ")
    assert errors[1].startswith("cannot get x from hub repository nobody/nothing: ")


def changed(out, tmp_path, **metadata):
    config = json.loads((out / "release" / RAW / "cfg.json").read_text())
    config["metadata"] |= metadata
    (tmp_path / "sae_weights.safetensors").write_bytes((out / "release" / RAW / "sae_weights.safetensors").read_bytes())
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    return tmp_path


def test_the_hook_names_the_site(out, tmp_path):
    assert open_sae(changed(out, tmp_path, hook_name="blocks.4.hook_resid_pre")).site == Site(3)
    assert open_sae(changed(out, tmp_path, hook_name="model.language_model.layers.3")).site == Site(3)
    assert open_sae(changed(out, tmp_path, hook_name=None)).site == Site(3)  # hf_hook_name says it
    unsaid = changed(out, tmp_path, hook_name=None, hf_hook_name=None)
    assert open_sae(unsaid, Site(5, "mlp.out")).site == Site(5, "mlp.out")
    with pytest.raises(UserError, match="give --site"):
        open_sae(unsaid)
    for hook, site in (("blocks.4.hook_mlp_out", Site(4, "mlp.out")), ("blocks.0.hook_resid_pre", EMBED)):
        assert open_sae(changed(out, tmp_path, hook_name=hook, hf_hook_name=None)).site == site
    for hook in ("blocks.4.hook_somewhere", "ln_final.hook_normalized"):
        with pytest.raises(UserError, match="is not a known site"):
            open_sae(changed(out, tmp_path, hook_name=hook))


def test_a_site_stands_in_and_never_overrules(out, tmp_path):
    """`--site` does not overrule a run, or a folder that states another layer or place."""
    run, folder = out / "runs" / RAW, changed(out, tmp_path)
    for where in (run, folder):
        assert open_sae(where, Site(3)).site == Site(3)
        with pytest.raises(UserError, match=r"--site layers.1: .* says that this SAE reads layers.3; leave --site out"):
            open_sae(where, Site(1))
    for hook in ("blocks.3.hook_mlp_out", "blocks.3.attn.hook_z", "blocks.3.hook_resid_mid", "model.layers.3.mlp"):
        where = changed(out, tmp_path, hook_name=hook, hf_hook_name=None)
        with pytest.raises(UserError, match=r"says that this SAE reads .*; leave --site out|is not a known site"):
            open_sae(where, Site(3))
    with pytest.raises(UserError, match="are different places; correct the wrong one"):
        open_sae(changed(out, tmp_path, hf_hook_name="model.layers.2"))


@pytest.mark.parametrize(("metadata", "words"), [
    ({}, None), ({"exclude_special_tokens": False, "seqpos_slice": [None]}, None),
    ({"seqpos_slice": [0, None, 1]}, None),
    ({"exclude_special_tokens": True}, "special tokens"), ({"exclude_special_tokens": [0, 2]}, "special tokens"),
    ({"seqpos_slice": [5, None]}, "positions outside [5, None]"), ({"seqpos_slice": [64]}, "positions outside [64]"),
    ({"exclude_special_tokens": True, "seqpos_slice": [0, None, 2]},
     "special tokens and positions outside [0, None, 2]"),
])
def test_rows_that_training_left_out_are_named(out, tmp_path, metadata, words):
    subject = open_sae(changed(out, tmp_path, **metadata))
    assert subject.unread == words and (subject.unread_note() is None) == (words is None)
    assert words is None or f"was trained without {words}" in subject.unread_note()


def test_what_is_no_sae_is_said_so(out, tmp_path):
    with pytest.raises(UserError, match="it holds nothing; give the folder or file of one SAE; known formats are "):
        open_sae(tmp_path)
    with pytest.raises(UserError, match="does not exist, and is neither an address on the hub"):
        open_sae("no-such-folder")
    with pytest.raises(UserError, match="holds no finished run"):
        find_saes(str(tmp_path))


@pytest.mark.parametrize(("said", "bos"), [(True, "yes"), (False, "no"), (None, "auto"), ("true", None)])
def test_what_a_folder_says_of_bos(out, tmp_path, said, bos):
    """Unknown does not mean no; a value that is neither true nor false is refused."""
    folder = shutil.copytree(out / "release" / RAW, tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["prepend_bos"] = said
    (folder / "cfg.json").unlink()
    (folder / "cfg.json").write_text(json.dumps(config))
    if bos is None:
        with pytest.raises(UserError, match="prepend_bos must be true or false, not 'true'"):
            open_sae(folder)
    else:
        assert open_sae(folder).bos == bos
