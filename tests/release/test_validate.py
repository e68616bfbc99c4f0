"""Validation by SAELens itself: a correct SAE passes, and each kind of mistake fails the check that names it."""

import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from olmoscope.errors import UserError
from olmoscope.release.agreement import TOLERANCE, code_difference, compare, random_rows
from olmoscope.release.export import export_run
from olmoscope.release.validate import validate
from olmoscope.sae.io import saelens
from olmoscope.sae.io.saelens_places import hook_names
from olmoscope.sae.topk import TopK
from olmoscope.site import Site
from olmoscope.train.initialize import initialize
from release_runs import LAYER_NORM, RAW, WIDTH, edit_json, synthetic_rows

METADATA = {"model_name": "m", "prepend_bos": False, **hook_names("model.layers", Site(3))}


def failed(validation) -> set[str]:
    return {check.name for check in validation.failures}


def test_a_release_passes_every_check(built):
    rows = {Site(layer): synthetic_rows(WIDTH, rows=300, seed=layer).bfloat16() for layer in (3, 7)}
    validation = validate(built / "release", rows=rows)
    assert validation.passed, validation.failures
    assert all(check.passed for check in validation.checks)
    names = {check.name for check in validation.checks if check.sae == RAW}
    assert names == {check.name for check in validation.checks if check.sae == LAYER_NORM}
    assert {"same on real rows", "same on bfloat16 rows", "tensors equal the checkpoint's"} <= names
    assert {check.figure for check in validation.checks if check.name == "tensors equal the checkpoint's"} == {
        "max abs difference 0.0"}
    assert {check.name for check in validation.checks if not check.sae} == {
        "root files", "checksums", "nothing unlisted", "registry entry"}


def test_a_single_folder_passes_with_and_without_its_run(out, tmp_path):
    validation = validate(export_run(out / "runs" / RAW).folder)
    assert validation.passed and all(check.passed for check in validation.checks)
    sae = initialize(WIDTH, 96, 4, "layer_norm", torch.zeros(WIDTH), seed=0)
    saelens.write(sae, tmp_path / "alone", METADATA)
    validation = validate(tmp_path / "alone")
    assert validation.passed
    assert [check.name for check in validation.checks if check.passed is None] == ["tensors equal the checkpoint's"]


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_equal_pre_activations_are_no_difference(tmp_path, normalize):
    """Every latent exists four times, so there are ties at the k-th place, which SAELens breaks in its own way."""
    sae = initialize(WIDTH, 24, 6, normalize, synthetic_rows(WIDTH).mean(dim=0), seed=0)
    twins = TopK(W_FD := sae.W_dec.repeat(4, 1), W_FD, sae.b_in, normalize, sae.b_latent.repeat(4), 6)
    saelens.write(twins, tmp_path / "twins", METADATA)
    validation = validate(tmp_path / "twins", rows={Site(3): synthetic_rows(WIDTH)})
    assert validation.passed, validation.failures


SAE = f"{RAW}/cfg.json"
WRONG = {
    "another k": (lambda cfg: cfg.update(k=5), {"settings survive", "same on random rows"}),
    "no k": (lambda cfg: cfg.pop("k"), {"cfg.json says everything", "settings survive"}),
    "no bias flag": (lambda cfg: cfg.pop("apply_b_dec_to_input"), {"cfg.json says everything"}),
    "bias not subtracted": (lambda cfg: cfg.update(apply_b_dec_to_input=False),
                            {"settings survive", "same on random rows"}),
    "normalised": (lambda cfg: cfg.update(normalize_activations="layer_norm"),
                   {"settings survive", "same on random rows"}),
    "rescaled": (lambda cfg: cfg.update(rescale_acts_by_decoder_norm=True), {"settings survive"}),
    "another architecture": (lambda cfg: cfg.update(architecture="standard"), {"settings survive"}),
    "metadata of no version": (lambda cfg: cfg["metadata"].pop("sae_lens_version"), {"metadata survives"}),
    "no hook": (lambda cfg: cfg["metadata"].pop("hook_name"), {"metadata survives"}),
    "another width": (lambda cfg: cfg.update(d_sae=97), {"loads in SAELens"}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_config_is_caught(copy, wrong):
    change, names = WRONG[wrong]
    edit_json(copy / "release" / SAE, change)
    validation = validate(copy / "release")
    assert not validation.passed
    assert names | {"checksums"} <= failed(validation)
    assert {check.sae for check in validation.failures} == {"", RAW}


TENSORS = {
    "a value off by the last bit": (lambda t: t["b_dec"].copy_(torch.nextafter(t["b_dec"], torch.tensor(9.0))),
                                    {"tensors equal the checkpoint's"}),
    "an encoder of its own": (lambda t: t["W_enc"][:, 3].mul_(1.01),
                              {"encoder is the decoder transposed", "tensors equal the checkpoint's",
                               "same on random rows"}),
    "a bias of another latent": (lambda t: t["b_enc"].copy_(t["b_enc"].roll(1) + 0.01), {"same on random rows"}),
    "NaN": (lambda t: t["b_dec"][0].fill_(torch.nan), {"tensors equal the checkpoint's", "same on random rows",
                                                       "same on constant rows", "finite reconstructions"}),
}


@pytest.mark.parametrize("wrong", TENSORS)
def test_wrong_weights_are_caught(copy, wrong):
    change, names = TENSORS[wrong]
    path = copy / "release" / RAW / "sae_weights.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    assert names | {"checksums"} <= failed(validate(copy / "release"))


@pytest.mark.parametrize(("name", "content", "names"), [
    (f"{RAW}/sae_weights.safetensors", b"cut", {"checksums", "loads in SAELens"}),
    (f"{RAW}/cfg.json", b"{", {"checksums", "loads in SAELens"}),
    (f"{RAW}/cfg.json", b"[]", {"checksums", "loads in SAELens"}),
    (f"{RAW}/training.log", None, {"checksums", "layout"}),
    ("README.md", b"another card", {"checksums"}),
    ("README.md", None, {"checksums", "root files"}),
    ("saelens_pretrained_saes.yaml", b"a: 1", {"checksums", "registry entry"}),
    ("saelens_pretrained_saes.yaml", b": {", {"checksums", "registry entry"}),
    ("notes.txt", b"mine", {"nothing unlisted"}),
])
def test_damaged_missing_and_foreign_files_are_caught(copy, name, content, names):
    path = copy / "release" / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    assert failed(validate(copy / "release")) == names


def test_a_release_of_other_weights_than_the_runs_is_caught(copy):
    """It was trained again later with the same recipe: only the checkpoint shows that."""
    path = copy / "runs" / RAW / "checkpoints" / "step-00000008.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors["W"][0] = -tensors["W"][0]
    save_file(tensors, path, metadata)
    assert "tensors equal the checkpoint's" in failed(validate(copy / "release"))


def test_what_is_no_release_is_refused(built, copy, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"neither a release .* nor an SAE folder .*; did you mean .*/release"):
        validate(built)
    with pytest.raises(UserError, match=r"no cfg.json\); give a release, an output folder with one"):
        validate(tmp_path)
    for content, saying in (("{}", "not an Olmoscope release: its manifest.json is another tool's"), ("{", "damaged"),
                            ('{"format": "olmoscope release"}', "damaged: version: Field required; make the release")):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=saying):
            validate(tmp_path)
    edit_json(copy / "release" / "manifest.json", lambda tree: tree.update(version=2))
    with pytest.raises(UserError, match="upgrade olmoscope"):
        validate(copy / "release")
    with pytest.raises(UserError, match="come from another model"):
        validate(built / "release", rows={Site(3): torch.randn(4, WIDTH + 1)})
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UserError, match=r"pip install 'olmoscope\[saelens\]'"):
        validate(built / "release")


def test_difference_of_codes_is_blind_to_ties_only():
    a_BF = torch.tensor([[3.0, 2.0, 0.0, 0.0]])
    for b_BF, k, expected in (([[3.0, 2.0, 0.0, 0.0]], 2, 0.0),
                              ([[3.0, 0.0, 2.0, 0.0]], 2, 0.0),  # a tie, broken the other way
                              ([[3.0, 0.0, 2.5, 0.0]], 2, 0.5),  # another latent, over the threshold
                              ([[3.0, 0.0, 0.0, 0.0]], 2, 2.0),  # one too few
                              ([[3.0, 2.0, 1.0, 0.0]], 2, torch.inf),  # one too many
                              ([[3.0, 2.0, -1.0, 0.0]], 3, 1.0),  # no ReLU
                              ([[3.0, 2.0, torch.nan, 0.0]], 3, torch.inf)):
        assert code_difference(a_BF, torch.tensor(b_BF), k).tolist() == [expected]
        assert code_difference(torch.tensor(b_BF), a_BF, k).tolist() == [expected]


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_agreement_at_a_real_width(tmp_path, normalize):
    """d_model 4096: the tolerance is far above rounding, and far below a mistake."""
    from sae_lens import SAE as SAELens
    generator = torch.Generator().manual_seed(0)
    sae = initialize(4096, 1024, 64, normalize, torch.randn(4096, generator=generator), seed=0)
    sae.b_latent += 0.1 * torch.randn(1024, generator=generator)
    saelens.write(sae, tmp_path / "sae", METADATA)
    theirs = SAELens.load_from_disk(tmp_path / "sae")
    x_BD = random_rows(sae)
    massive_BD = x_BD.clone()
    massive_BD[:, 7] *= 500
    for rows_BD in (x_BD, massive_BD):
        agreement = compare(sae, theirs, rows_BD)
        assert max(agreement.encode, agreement.decode) < TOLERANCE / 5, agreement
    sae.b_in[0] += 0.05
    assert compare(sae, theirs, x_BD).encode > 2 * TOLERANCE
