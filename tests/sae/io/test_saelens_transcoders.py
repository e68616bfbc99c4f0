"""Transcoders in SAELens' format compute the same in both: theirs, written by sae-lens itself, here; and ours there."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmoscope.errors import UserError
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.io import saelens
from olmoscope.sae.io.place import Here
from olmoscope.sae.io.saelens_places import hook_names
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.site import EMBED, Site, SiteModule

D_IN, D_OUT, F, ROWS, K = 24, 18, 96, 64, 7
READS, WRITES = Site(3, "mlp.in"), Site(3, "mlp.out")
KINDS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
WHERE = hook_names("model.layers", READS) | hook_names("model.layers", WRITES, out=True)
METADATA = {"model_name": "tiny", "prepend_bos": False, "hf_hook_name": None, "hf_hook_name_out": None} | WHERE


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(width=D_IN):
    """Ordinary rows, a row of zeros, equal rows, a channel and a row far beyond the others."""
    x_BD = randn(0, ROWS, width) * torch.linspace(0.5, 3, width) + 1
    x_BD[3] = 0
    x_BD[5] = x_BD[6]
    x_BD[7] *= 300
    x_BD[10:20, 2] = 400
    return x_BD


def theirs_in(folder, architecture, width=D_IN, **settings):
    """A transcoder of sae-lens' own, saved by itself. Some latents are twins: equal pre-activations, all of them."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_class(architecture)
    settings = {"apply_b_dec_to_input": False} | settings
    if architecture.endswith("transcoder"):
        settings["d_out"] = D_OUT
    theirs = sae_class(config_class(d_in=width, d_sae=F, metadata=SAEMetadata(**METADATA), **settings))
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(theirs.named_parameters()):
            parameter.copy_(randn(seed + 1, *parameter.shape) * (0.3 if parameter.dim() > 1 else 0.5))
            if "threshold" in name:
                parameter.abs_()
            if name in ("W_enc", "b_enc", "threshold"):
                parameter[..., 10:15] = parameter[..., 20:25]
    theirs.save_model(folder)
    return folder


def change(folder, **values):
    """Other settings, and other metadata, in a cfg.json; `...` takes a key out."""
    config = json.loads((folder / "cfg.json").read_text())
    for tree, new in ((config["metadata"], values.pop("metadata", {})), (config, values)):
        tree |= new
        for key in [key for key, value in tree.items() if value is ...]:
            del tree[key]
    (folder / "cfg.json").write_text(json.dumps(config))


def both(folder, x_BD):
    """Codes and outputs of the real SAELens, and ours, dense."""
    from sae_lens import SAE

    theirs, ours = SAE.load_from_disk(folder), saelens.read(Here(folder)).sae
    with torch.no_grad():
        z_BF, y_BD = theirs.encode(x_BD), theirs(x_BD)
    found_BD, codes = ours.reconstruct(x_BD)
    return (z_BF, y_BD), (codes.to_dense(), found_BD)


def assert_equal(theirs, ours):
    """Equal to float32 rounding, 1e-6 of each row's largest value; the active latents are equal except for rounding."""
    for want_BF, found_BF in zip(theirs, ours, strict=True):
        assert want_BF.shape == found_BF.shape
        scale_B1 = want_BF.abs().amax(dim=1, keepdim=True).clamp_min(1)
        assert float(((want_BF - found_BF).abs() / scale_B1).max()) < 1e-6
    assert 0 < float((theirs[0] > 0).double().mean()) < 0.9


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", KINDS)
def test_agrees_with_saelens(tmp_path, architecture, normalize):
    folder = theirs_in(tmp_path, architecture, normalize_activations=normalize)
    assert_equal(*both(folder, rows()))
    opened = saelens.read(Here(folder))
    assert (opened.reads, opened.writes, opened.site) == ((READS,), (WRITES,), WRITES)
    assert opened.architecture == architecture and opened.sae.transcoder
    tensors = load_file(folder / "sae_weights.safetensors")
    assert tensors["W_enc"].shape == (D_IN, F) and tensors["W_dec"].shape == (F, D_OUT)
    assert torch.equal(opened.sae.W_enc, tensors["W_enc"].T) and torch.equal(opened.sae.W_dec, tensors["W_dec"])
    assert torch.equal(opened.sae.b_out, tensors["b_dec"]) and not opened.sae.b_in.any()
    skip = opened.sae.W_skip
    assert (skip is None) == ("skip" not in architecture)
    assert skip is None or (torch.equal(skip, tensors["W_skip"]) and skip.shape == (D_OUT, D_IN))


def test_a_row_of_zeros_gets_what_the_biases_say(tmp_path):
    theirs_in(tmp_path, "skip_transcoder")
    sae = saelens.read(Here(tmp_path)).sae
    y_BD, codes = sae.reconstruct(torch.zeros(1, D_IN))
    z_F = sae.b_latent.relu()
    torch.testing.assert_close(codes.to_dense()[0], z_F)
    torch.testing.assert_close(y_BD[0], z_F @ sae.W_dec + sae.b_out)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
def test_an_sae_that_writes_elsewhere_is_a_transcoder(tmp_path, architecture, centred):
    """In SAELens, only the metadata decide where an SAE's output goes."""
    settings = {"k": K} if architecture == "topk" else {}
    x_BD = rows().unique(dim=0)[:40] if architecture == "topk" else rows()
    folder = theirs_in(tmp_path, architecture, apply_b_dec_to_input=centred, **settings)
    theirs, ours = both(folder, x_BD)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-3)
    opened = saelens.read(Here(folder))
    assert opened.sae.transcoder and (opened.reads, opened.writes) == ((READS,), (WRITES,))
    assert bool(opened.sae.b_in.any()) == centred
    change(folder, normalize_activations="layer_norm")
    with pytest.raises(UserError, match="normalize_activations 'layer_norm': SAELens undoes it"):
        saelens.read(Here(folder))


def made(kind, skip, d_out=D_OUT, normalize="none", b_in=True):
    """A transcoder of ours; TopK and JumpReLU."""
    state = {"W_enc": randn(1, F, D_IN), "W_dec": randn(2, F, d_out), "b_latent": randn(3, F),
             "b_in": randn(4, D_IN) if b_in else torch.zeros(D_IN), "b_out": randn(5, d_out)}
    if skip:
        state["W_skip"] = randn(6, d_out, D_IN)
    settings = {"normalize": normalize, "transcoder": True, "reads": (READS,), "writes": (WRITES,)}
    if kind == "topk":
        return TopK.from_state_dict(state, k=K, **settings)
    threshold_F = torch.zeros(F) if kind == "relu" else randn(7, F).abs()
    return JumpReLU.from_state_dict(state | {"threshold": threshold_F}, **settings)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_what_is_written_is_what_saelens_computes(tmp_path, kind, skip, normalize):
    from sae_lens import SAE

    ours, x_BD = made(kind, skip, normalize=normalize), rows()
    assert saelens.write(ours, tmp_path, METADATA) and not saelens.write(ours, tmp_path, METADATA)
    architecture = f"{'jumprelu_' if kind == 'jumprelu' else ''}{'skip_' if skip else ''}transcoder"
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert set(config) == set(saelens.KEYS[architecture])
    assert (config["architecture"], config["d_in"], config["d_out"]) == (architecture, D_IN, D_OUT)
    assert config["apply_b_dec_to_input"] is False
    theirs = SAE.load_from_disk(tmp_path)
    assert type(theirs).__name__.lower() == architecture.replace("_", "")
    y_BD, codes = ours.reconstruct(x_BD)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x_BD), codes.to_dense(), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(theirs(x_BD), y_BD, rtol=1e-4, atol=1e-3)
    assert_equal(*both(tmp_path, x_BD))
    opened = saelens.read(Here(tmp_path))
    assert (opened.reads, opened.writes) == ((READS,), (WRITES,))


@pytest.mark.parametrize(("kind", "skip"), [("relu", True), ("jumprelu", False), ("jumprelu", True)])
def test_what_is_written_is_read_bit_by_bit(tmp_path, kind, skip):
    sae = made(kind, skip, b_in=False)
    saelens.write(sae, tmp_path, METADATA)
    found = saelens.read(Here(tmp_path)).sae
    for name, tensor in sae.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    assert not saelens.write(found, tmp_path, METADATA)


def test_the_k_largest_between_rows_of_one_width(tmp_path):
    """SAELens has no such transcoder, but a `topk` SAE that is told to write elsewhere computes it."""
    from sae_lens import SAE

    sae, x_BD = made("topk", False, d_out=D_IN), rows()[20:]
    saelens.write(sae, tmp_path, METADATA)
    theirs, config = SAE.load_from_disk(tmp_path), json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["k"], config["apply_b_dec_to_input"]) == ("topk", K, False)
    assert set(config) == set(saelens.KEYS["topk"])
    y_BD, codes = sae.reconstruct(x_BD)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x_BD), codes.to_dense(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs(x_BD), y_BD, rtol=1e-4, atol=1e-3)
    opened = saelens.read(Here(tmp_path))
    assert isinstance(opened.sae, TopK) and (opened.reads, opened.writes) == ((READS,), (WRITES,))
    torch.testing.assert_close(opened.sae.reconstruct(x_BD)[0], y_BD, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("sae", "saying"), [
    (made("topk", True, D_IN), "TopK.* with a skip: SAELens has transcoders of the k largest latents only without"),
    (made("topk", False), r"TopK\(width 24 to 18.*activation: batchtopk or jumprelu"),
    (made("topk", False, D_IN, "layer_norm"), "not normalised"),
    (TopK(*[randn(1, F, 6)] * 2, randn(2, 6), "none", randn(3, F), K).at([Site(1), Site(2)]), "has no crosscoders"),
    (GroupMax.from_state_dict(made("topk", False).state_dict(), k=8, normalize="none", transcoder=True), "a GroupMax"),
])
def test_what_saelens_cannot_compute_is_not_written(tmp_path, sae, saying):
    with pytest.raises(UserError, match=saying) as refusal:
        saelens.write(sae, tmp_path / "sae", METADATA)
    assert "\n" not in str(refusal.value) and not (tmp_path / "sae").exists()


def loaded(**settings):
    return {"metadata": {"model_from_pretrained_kwargs": settings}}


@pytest.mark.parametrize(("values", "saying"), [
    ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be false"),
    ({"apply_b_dec_to_input": ...}, "apply_b_dec_to_input must be false"),
    ({"d_out": 17}, "has d_out 18; cfg.json says 17"),
    ({"d_in": 23}, "says 23, 96"),
    ({"metadata": {"hook_name": ..., "hf_hook_name": ...}}, "which site the transcoder reads: write it there"),
    ({"metadata": {"hook_name_out": ..., "hf_hook_name_out": ...}}, "which site the transcoder writes .*; give --site"),
    ({"metadata": {"hook_name_out": "blocks.3.somewhere"}}, "hook_name_out 'blocks.3.somewhere' is not a known site"),
    ({"metadata": {"hook_name": "blocks.3.ln2.hook_normalized"}}, "hook_name .* is not a known site"),
    ({"metadata": {"hf_hook_name_out": "model.layers.2"}}, "hook_name_out .* are different places"),
    ({"metadata": {"hook_layer_out": 4}}, "hook_layer_out 4 are different layers"),
    ({"metadata": {"hook_head_index_out": 1}}, "hook_head_index_out 1: an SAE of one attention head is not"),
    (loaded(fold_ln=True), "fold_ln: it changes the rows at layers.3.mlp.in"),
    (loaded(center_writing_weights=True), "writes rows without their mean"),
])
def test_what_is_not_understood_is_refused(tmp_path, values, saying):
    theirs_in(tmp_path, "jumprelu_skip_transcoder")
    change(tmp_path, **values)
    with pytest.raises(UserError, match=saying) as refusal:
        saelens.read(Here(tmp_path))
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


def test_tensors_of_another_kind_are_refused(tmp_path):
    theirs_in(tmp_path, "skip_transcoder")
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    turned = {name: tensors[name].T.contiguous() for name in ("W_skip", "W_dec")}
    for changes, saying in (({"W_skip": turned["W_skip"]}, r"W_skip has shape \[24, 18\], not \[18, 24\]"),
                            ({"W_dec": turned["W_dec"]}, "has shape"),
                            ({"W_dec": torch.zeros(F)}, "has shape"),
                            ({"b_dec": torch.zeros(D_IN)}, r"b_dec has shape \[24\], not \[18\]")):
        save_file(tensors | changes, tmp_path / "sae_weights.safetensors")
        with pytest.raises(UserError, match=saying):
            saelens.read(Here(tmp_path))
    del tensors["W_skip"]
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UserError, match="a skip_transcoder SAE has"):
        saelens.read(Here(tmp_path))


def test_a_site_stands_in_for_what_is_written(tmp_path):
    theirs_in(tmp_path, "transcoder")
    change(tmp_path, metadata={"hook_name_out": ..., "hf_hook_name_out": ...})
    assert saelens.read(Here(tmp_path), Site(4, "mlp.out")).writes == (Site(4, "mlp.out"),)
    change(tmp_path, metadata={"hook_name_out": "blocks.3.hook_mlp_out"})
    assert saelens.read(Here(tmp_path), WRITES).site == WRITES
    with pytest.raises(UserError, match=r"--site layers.3.mlp.in: .* says that this SAE writes layers.3.mlp.out"):
        saelens.read(Here(tmp_path), READS)


def test_older_names_have_the_layer_beside_them(tmp_path):
    theirs_in(tmp_path, "transcoder")
    change(tmp_path, metadata={"hook_name": "blocks.{layer}.hook_resid_mid", "hook_layer": 2,
                               "hook_name_out": "blocks.{layer}.hook_mlp_out", "hook_layer_out": 5})
    opened = saelens.read(Here(tmp_path))
    assert (opened.reads, opened.writes) == ((Site(2, "mid"),), (Site(5, "mlp.out"),))


@pytest.mark.parametrize("site", [EMBED, Site(3), Site(3, "mid"), READS, WRITES, Site(3, "attn.in"),
                                  Site(3, "attn.out"), Site(3, "attn.z")])
def test_every_site_has_names_that_lead_back(tmp_path, site):
    """The name of a module means its output; its input has a name of its own."""
    module = SiteModule("model.layers.3.mlp", "input" if site.part.endswith("in") else "output", 0.25)
    names = hook_names("model.layers", site, module)
    assert names["hf_hook_name"] == "model.layers.3.mlp" + (".input" if site.part.endswith("in") else "")
    assert names["hf_hook_scale"] == 0.25 and "hf_hook_scale" not in hook_names("model.layers", Site(3))
    assert set(hook_names("model.layers", site, module, out=True)) == {f"{key}_out" for key in names}
    theirs_in(tmp_path, "standard", apply_b_dec_to_input=True)
    change(tmp_path, metadata=hook_names("model.layers", site) | {"hook_name_out": ..., "hf_hook_name_out": ...})
    assert saelens.read(Here(tmp_path)).site == site


def test_a_layers_own_names(tmp_path):
    assert hook_names("h", Site(3)) == {"hook_name": "blocks.3.hook_resid_post", "hf_hook_name": "h.3"}
    assert hook_names("h", EMBED)["hf_hook_name"] == "h.0.input"
    theirs_in(tmp_path, "standard", apply_b_dec_to_input=True)
    for name, site in (("model.layers.3.output", Site(3)), ("model.layers.3.input", Site(2)), ("h.0.input", EMBED)):
        change(tmp_path, metadata={"hook_name": ..., "hf_hook_name": name, "hook_name_out": ...})
        assert saelens.read(Here(tmp_path)).site == site
