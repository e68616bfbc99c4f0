"""SAEs that their owners' own classes wrote (tests/foreign/make.py) compute here what they compute there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from olmoscope.files import sha256
from olmoscope.sae.io import dictionary_learning, llamascopium, sparsify
from olmoscope.sae.io.open import format_of, look_at, open_sae
from olmoscope.sae.io.place import Here
from olmoscope.site import Site

FOREIGN = Path(__file__).parents[2] / "foreign"
FOLDERS = sorted(path.parent for path in FOREIGN.rglob("expected.safetensors"))
FORMATS = {"sparsify": sparsify, "dictionary_learning": dictionary_learning, "llamascopium": llamascopium}
OUTLIERS = slice(5, 8)


def named(folder):
    return folder.relative_to(FOREIGN).as_posix()


def assert_equal(found_BX, wanted_BX, x_BD):
    """To 1e-6 of a row's size, or of 1."""
    scale_B1 = wanted_BX.abs().amax(dim=1, keepdim=True).maximum(x_BD.abs().amax(dim=1, keepdim=True)).clamp_min(1)
    assert float(((found_BX - wanted_BX) / scale_B1).abs().max()) < 1e-6


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_codes_and_reconstructions_are_the_owners(folder):
    expected = load_file(folder / "expected.safetensors")
    if named(folder) == "llamascopium/topk":  # token-wise, a row of zeros is NaN there
        assert expected["out"][3].isnan().all()
        expected["out"][3] = load_file(folder / "sae_weights.safetensors")["b_D"] * 0
        expected["codes"][3] = open_sae(folder).sae.encode(expected["x"][3]).to_dense()
    assert format_of(Here(folder)) is FORMATS[named(folder).partition("/")[0]]
    opened, x_BD = open_sae(folder), expected["x"]
    out_BD, codes = opened.sae.reconstruct(x_BD)
    codes_BF = codes.to_dense()
    if named(folder) == "llamascopium/topk_norm":  # which divides codes by the length of the decoder's rows again
        length_F = load_file(folder / "sae_weights.safetensors")["W_D"].norm(dim=1)
        codes_BF = codes_BF / length_F
    assert not x_BD[3].any() and float(x_BD[OUTLIERS].abs().max()) > 500
    density = float((expected["codes"] != 0).double().mean())
    assert 0.02 < density < 0.9
    same_B = (codes_BF != 0).eq(expected["codes"] != 0).all(dim=1)
    # Latents 0 and 1 tie; if one of them is the last to be active, no rule says which one it is.
    others_BF = torch.cat([codes_BF[:, :2].sum(dim=1, keepdim=True), codes_BF[:, 2:]], dim=1)
    wanted_BF = torch.cat([expected["codes"][:, :2].sum(dim=1, keepdim=True), expected["codes"][:, 2:]], dim=1)
    assert_equal(others_BF, wanted_BF, x_BD)
    assert_equal(codes_BF[same_B], expected["codes"][same_B], x_BD[same_B])
    assert_equal(out_BD[same_B], expected["out"][same_B], x_BD[same_B])
    assert int(same_B.sum()) >= len(x_BD) - 3 and same_B[3] and same_B[OUTLIERS].any()


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_what_is_looked_at_is_what_is_opened(folder):
    _, reading = look_at(folder)
    opened = open_sae(folder)
    sae = opened.sae
    assert (reading.d_in, reading.d_out, reading.d_sae) == (sae.d_in, sae.d_out, sae.d_sae)
    assert (reading.reads, reading.writes, reading.transcoder) == (sae.reads, sae.writes, sae.transcoder)
    assert reading.k == getattr(sae, "k", None) and opened.architecture == reading.architecture
    assert len(reading.formula()) == 3 and opened.identity.startswith("sha256:")
    assert opened.files == {name: sha256(folder / name) for name in reading.files}


@pytest.mark.parametrize(("name", "reads", "writes"), [
    ("sparsify/topk/layers.3", Site(3), Site(3)), ("sparsify/expansion/h.5", Site(5), Site(5)),
    ("sparsify/skip/layers.1.mlp", Site(1, "mlp.in"), Site(1, "mlp.out")),
    ("dictionary_learning/AutoEncoder/trainer_0", Site(5), Site(5)), ("llamascopium/relu", Site(4), Site(4))])
def test_sites(name, reads, writes):
    _, reading = look_at(FOREIGN / name)
    assert (reading.reads, reading.writes) == ((reads,), (writes,))


def test_where_saelens_reads_it_otherwise_is_said():
    _, reading = look_at(FOREIGN / "sparsify/topk/layers.3")
    assert "SAELens' loader for sparsify differs from sparsify: it transposes W_dec" in reading.notes[0]
    assert (reading.model_name, reading.context_size, reading.centred) == ("some/model", 256, True)
