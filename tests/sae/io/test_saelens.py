"""Other people's SAEs, written by sae-lens itself, encode and decode the same here as there, value by value."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmoscope.errors import UserError
from olmoscope.release.agreement import code_difference
from olmoscope.sae import threshold
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.io import saelens
from olmoscope.sae.io.place import Here
from olmoscope.sae.io.registered import Registered
from olmoscope.site import Site
from olmoscope.train.initialize import initialize

D, F, ROWS = 24, 96, 200
METADATA = {"model_name": "tiny", "hook_name": "blocks.3.hook_resid_post"}


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, D, generator=generator) * torch.linspace(0.5, 3, D) + 2


def random_parameters(sae, seed=1):
    """Every parameter of a sae-lens SAE away from its initial value; thresholds positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 0.5))
            if "threshold" in name:
                parameter.abs_()
    return sae


def theirs_in(folder, architecture, **settings):
    """An SAE of sae-lens' own, saved by itself."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_class(architecture)
    config = config_class(d_in=D, d_sae=F, metadata=SAEMetadata(**METADATA), **settings)
    random_parameters(sae_class(config)).save_model(folder)
    return folder


def assert_agrees(folder, x_BD):
    from sae_lens import SAE

    theirs, ours = SAE.load_from_disk(folder), saelens.read(Here(folder)).sae
    with torch.no_grad():
        z_BF = theirs.encode(x_BD)
        xhat_BD = theirs.decode(z_BF)
    codes = ours.encode(x_BD)
    assert float(codes.values.min()) >= 0
    assert (codes.values.diff(dim=1) <= 0).all()
    scale = float(z_BF.max())
    difference_B = code_difference(codes.to_dense(), z_BF, F)
    assert float(difference_B.max()) < 1e-5 * scale
    # Both must be neither empty nor full, or the comparison says nothing.
    assert 0 < float((z_BF > 0).double().mean()) < 0.9
    assert (codes.l0() - z_BF.count_nonzero(dim=1)).abs().sum() <= 1  # a pre-activation at the threshold to rounding
    torch.testing.assert_close(ours.reconstruct(x_BD)[0], xhat_BD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.to("cpu").reconstruct(x_BD)[0], ours.reconstruct(x_BD)[0], rtol=0, atol=0)


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
def test_agrees_with_saelens(tmp_path, architecture, normalize):
    settings = {"k": 7} if architecture == "topk" else {}
    for centred in (True, False):
        folder = theirs_in(tmp_path / str(centred), architecture, normalize_activations=normalize,
                           apply_b_dec_to_input=centred, **settings)
        assert_agrees(folder, rows())


@pytest.mark.parametrize("rescale", [True, False])
def test_latents_of_both_signs_stand_twice(tmp_path, rescale):
    """AbsTopK: latent F + j is latent j where it fires negatively."""
    from sae_lens import SAE

    folder = theirs_in(tmp_path, "abstopk", k=7, rescale_acts_by_decoder_norm=rescale)
    theirs, ours, x_BD = SAE.load_from_disk(folder), saelens.read(Here(folder)).sae, rows()
    with torch.no_grad():
        z_BF = theirs.encode(x_BD)
        codes_BF = ours.encode(x_BD).to_dense()
        torch.testing.assert_close(codes_BF[:, :F] - codes_BF[:, F:], z_BF.to_dense(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.reconstruct(x_BD)[0], theirs.decode(z_BF), rtol=1e-5, atol=1e-5)
    assert float(z_BF.to_dense().min()) < 0


def test_rescaling_by_decoder_norms_is_folded(tmp_path):
    assert_agrees(theirs_in(tmp_path, "topk", k=7, rescale_acts_by_decoder_norm=True), rows())


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_batch_topk_as_trained_and_as_published(tmp_path, architecture, rescale):
    """sae-lens writes these for inference as jumprelu; its training checkpoint also has the threshold."""
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_training_class(architecture)
    extra = {"matryoshka_widths": [24, F]} if architecture.startswith("matryoshka") else {}
    config = config_class(d_in=D, d_sae=F, k=7, rescale_acts_by_decoder_norm=rescale,
                          metadata=SAEMetadata(**METADATA), **extra)
    trained = random_parameters(sae_class(config))
    trained.topk_threshold.fill_(0.7)
    trained.save_model(tmp_path / "checkpoint")
    trained.save_inference_model(tmp_path / "published")
    assert_agrees(tmp_path / "published", rows())
    published = saelens.read(Here(tmp_path / "published")).sae
    checkpoint = saelens.read(Here(tmp_path / "checkpoint")).sae
    torch.testing.assert_close(checkpoint.reconstruct(rows())[0], published.reconstruct(rows())[0])


def test_dense_codes_are_bounded(tmp_path, monkeypatch):
    """Chunks of a few rows give the same codes as all at once."""
    sae = saelens.read(Here(theirs_in(tmp_path, "jumprelu"))).sae
    whole = sae.encode(rows())
    monkeypatch.setattr(threshold, "DENSE_AT_ONCE", 5 * F)
    seen = []
    activations = type(sae).activations
    monkeypatch.setattr(type(sae), "activations", lambda self, p: seen.append(p.numel()) or activations(self, p))
    parts = sae.encode(rows())
    assert max(seen) <= 5 * F
    torch.testing.assert_close(parts.to_dense(), whole.to_dense())


def test_layout_before_version_6(tmp_path):
    """Without metadata, and with the activation function as a setting: read as by SAELens' own loader."""
    theirs_in(tmp_path, "topk", k=7)
    old = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "activation_fn_str": "topk",
           "activation_fn_kwargs": {"k": 7}, "hook_point": "blocks.3.hook_resid_post", "model_name": "tiny",
           "normalize_activations": False, "sae_lens_training_version": None}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    assert_agrees(tmp_path, rows())
    read = saelens.read(Here(tmp_path))
    assert (read.architecture, read.metadata["hook_name"]) == ("topk", "blocks.3.hook_resid_post")
    assert read.metadata["prepend_bos"] is True


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
@pytest.mark.parametrize("dtype", ["bfloat16", "torch.float16"])
def test_weights_are_rounded_to_the_dtype_that_is_said(tmp_path, architecture, dtype):
    """SAELens loads the weights in it, in whatever precision the file holds them."""
    from sae_lens import SAE

    theirs_in(tmp_path, architecture, **({"k": 7} if architecture == "topk" else {}))
    change(tmp_path, dtype=dtype)
    theirs, ours = SAE.load_from_disk(tmp_path).to(torch.float32), saelens.read(Here(tmp_path)).sae
    assert torch.equal(ours.W_dec, theirs.W_dec) and torch.equal(ours.W_enc.T, theirs.W_enc)
    exact = load_file(tmp_path / "sae_weights.safetensors")["W_dec"]
    assert not torch.equal(ours.W_dec, exact)
    with torch.no_grad():
        z_BF = theirs.encode(rows())
        xhat_BD = theirs.decode(z_BF)
    assert float(code_difference(ours.encode(rows()).to_dense(), z_BF, F).max()) < 1e-5 * float(z_BF.max())
    torch.testing.assert_close(ours.reconstruct(rows())[0], xhat_BD, rtol=1e-4, atol=1e-4)


def centring(folder, **kwargs):
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["model_from_pretrained_kwargs"] = kwargs
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
def test_centred_writing_weights(tmp_path, architecture, centred, normalize):
    """Codes equal SAELens' for rows without their mean; the reconstruction has the mean again."""
    from sae_lens import SAE

    settings = {"k": 7} if architecture == "topk" else {}
    folder = centring(theirs_in(tmp_path, architecture, apply_b_dec_to_input=centred, normalize_activations=normalize,
                                **settings), center_writing_weights=True, fold_ln=True)
    theirs, ours, x_BD = SAE.load_from_disk(folder), saelens.read(Here(folder)).sae, rows()
    mean_B1 = x_BD.mean(dim=1, keepdim=True)
    assert float(mean_B1.abs().min()) > 0.1
    with torch.no_grad():
        z_BF = theirs.encode(x_BD - mean_B1)
        xhat_BD = theirs.decode(z_BF) + mean_B1
    assert float(code_difference(ours.encode(x_BD).to_dense(), z_BF, F).max()) < 1e-5 * float(z_BF.max())
    torch.testing.assert_close(ours.reconstruct(x_BD)[0], xhat_BD, rtol=1e-4, atol=1e-4)


def test_centring_is_what_transformer_lens_does_to_the_stream():
    """The rows of a model with centred writing weights are those of the model without their mean."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    model = HookedTransformer(HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=16, d_head=6, n_heads=4, d_mlp=48, d_vocab=50, act_fn="gelu",
        normalization_type="LN", device="cpu", seed=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) + 0.05)
    tokens = torch.randint(0, 50, (3, 10))
    before = model.run_with_cache(tokens)[1]
    model.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
    after = model.run_with_cache(tokens)[1]
    for layer in (0, 1):
        x_BTD = before[f"blocks.{layer}.hook_resid_post"]
        wanted = x_BTD - x_BTD.mean(dim=-1, keepdim=True)
        assert float((wanted - x_BTD).abs().max()) > 0.05
        torch.testing.assert_close(after[f"blocks.{layer}.hook_resid_post"], wanted, rtol=1e-3, atol=1e-3)


def test_what_changes_nothing_is_passed_over(tmp_path):
    """Settings of training, of how the model was loaded, and a scaling factor of 1."""
    folder = centring(theirs_in(tmp_path, "standard"), center_writing_weights=False, fold_ln=True, n_devices=2,
                      center_unembed=True, device_map="auto", revision="step1000")
    change(folder, l1_coefficient=5, lr=1e-3, finetuning_scaling_factor=False, some_new_switch=None, another=False)
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"scaling_factor": torch.ones(F)}, folder / "sae_weights.safetensors")
    assert_agrees(folder, rows())
    read = saelens.read(Here(folder))
    assert read.sae.normalize == "none" and read.metadata["model_revision"] == "step1000"


def meaning(**metadata):
    return {"metadata": METADATA | {"sae_lens_version": "6.0.0"} | metadata}


def kwargs(**values):
    return meaning(model_from_pretrained_kwargs=values)


def change(folder, **values):
    config = json.loads((folder / "cfg.json").read_text()) | values
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize(("values", "message"), [
    ({"architecture": "temporal"}, "architecture 'temporal': it is a temporal SAE"),
    ({"k": ...}, "k must be a number from 1 to 96"),
    ({"normalize_activations": "expected_average_only_in"}, "not in the folder"),
    ({"normalize_activations": "covariance_whitening"}, "not in the folder"),
    ({"normalize_activations": "odd"}, "'odd' is unknown"),
    ({"reshape_activations": "hook_z"}, "for attn.hook_z"),
    ({"d_sae": 95}, "says 24, 95"),
    ({"metadata": {}, "activation_fn": "tanh-relu"}, "'tanh-relu' is not supported"),
    ({"metadata": {}, "activation_fn": "topk", "activation_fn_kwargs": {"k": 7, "postact_fn": "identity"}},
     "activation_fn_kwargs.postact_fn"),
    ({"metadata": "none"}, "it does not hold a mapping"),
    ({"dtype": "int4"}, "dtype 'int4' is unknown"),
    ({"input_scale": 0.5}, r"input_scale \(0.5\) is not a known setting"),
    ({"d_out": 24}, "d_out"),
    ({"architecture": "skip_transcoder"}, "which site the transcoder writes"),
    ({"architecture": "matching_pursuit"}, "'matching_pursuit': it is a matching-pursuit SAE"),
    (meaning(hook_head_index=3), "hook_head_index 3: an SAE of one attention head is not"),
    ({"hook_head_index": 3}, "hook_head_index 3"),
    (meaning(model_class_name="HookedMamba"), "model_class_name 'HookedMamba'"),
    (kwargs(checkpoint_value=1000), r"model_from_pretrained_kwargs.checkpoint_value \(1000\)"),
    (kwargs(load_in_8bit=True), "load_in_8bit"),
    (kwargs(revision="a") | {"metadata": kwargs(revision="a")["metadata"] | {"model_revision": "b"}}, "the wrong one"),
    ({"normalize_activations": "constant_norm_rescale"} | kwargs(center_writing_weights=True), "together with center"),
])
def test_what_cannot_be_read_is_refused(tmp_path, values, message):
    theirs_in(tmp_path, "topk", k=7)
    change(tmp_path, **values)
    with pytest.raises(UserError, match=message) as refusal:
        saelens.read(Here(tmp_path))
    assert str(tmp_path) in str(refusal.value) and "cfg.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_damaged_folders_are_refused(tmp_path):
    theirs_in(tmp_path, "topk", k=7)
    tensors = load_file(tmp_path / "sae_weights.safetensors")

    def saved(**changes):
        save_file({name: tensor for name, tensor in (tensors | changes).items() if tensor is not None},
                  tmp_path / "sae_weights.safetensors")

    for changes, message in (({"b_enc": None}, "a topk SAE has"),
                             ({"scaling_factor": torch.full((F,), 2.0)}, "scaling_factor: activations are scaled"),
                             ({"more": torch.zeros(2)}, "holds W_dec"),
                             ({"b_enc": torch.zeros(3)}, "b_enc has shape"),
                             ({"b_enc": torch.full((F,), torch.nan)}, "b_enc holds NaN")):
        saved(**changes)
        with pytest.raises(UserError, match=message):
            saelens.read(Here(tmp_path))
    (tmp_path / "sae_weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is damaged"):
        saelens.read(Here(tmp_path))
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"sae_weights.safetensors is missing"):
        saelens.read(Here(tmp_path))
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        saelens.read(Here(tmp_path))
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(UserError, match=r"cfg.json is missing"):
        saelens.read(Here(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_what_is_written_is_read_bit_by_bit(tmp_path, kind, normalize, tied):
    sae = initialize(D, F, 7, normalize, torch.randn(D), seed=0, tied=tied)
    sae.b_latent += torch.randn(F)
    if kind == "jumprelu":
        sae = threshold.JumpReLU(sae.W_enc, sae.W_dec, sae.b_in, normalize, sae.b_latent, torch.rand(F))
    metadata = METADATA | {"hf_hook_name": "model.layers.3", "prepend_bos": True}
    assert saelens.write(sae, tmp_path / "sae", metadata) and not saelens.write(sae, tmp_path / "sae", metadata)
    opened = saelens.read(Here(tmp_path / "sae"))
    assert type(opened.sae) is type(sae)
    for name, value in vars(sae).items():
        found, wanted = getattr(opened.sae, name), (Site(3),) if name in ("reads", "writes") else value
        assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted
    assert (opened.name, opened.site, opened.model_name, opened.bos) == ("sae", Site(3), "tiny", "yes")
    assert (opened.architecture, opened.dtype) == (kind, torch.float32)


def test_what_saelens_cannot_compute_is_not_written(tmp_path):
    fresh = initialize(D, F, 6, "none", torch.zeros(D), seed=0)
    for sae in (GroupMax(**vars(fresh)), saelens.read(Here(theirs_in(tmp_path / "gated", "gated"))).sae):
        with pytest.raises(UserError, match="SAE cannot be written in SAELens' format"):
            saelens.write(sae, tmp_path / "sae", METADATA | {"hf_hook_name": None, "prepend_bos": True})
    assert not (tmp_path / "sae").exists()


def test_the_scale_of_the_registry_is_folded(tmp_path):
    """`expected_average_only_in` as SAELens itself folds it; without the figure it is refused."""
    from sae_lens import SAE

    for kind in ("standard", "jumprelu", "gated"):
        for centred in (True, False):
            folder = theirs_in(tmp_path / kind / str(centred), kind, apply_b_dec_to_input=centred,
                               normalize_activations="expected_average_only_in")
            place = Here(folder)
            with pytest.raises(UserError, match="open it as saelens:RELEASE/ID"):
                saelens.read(place)
            place.registered = Registered("release", "id", "some/repo", "", "tiny", None, scale=0.25)
            theirs, x_BD = SAE.load_from_disk(folder), 4 * rows()
            theirs.fold_activation_norm_scaling_factor(0.25)
            ours = saelens.read(place).sae
            with torch.no_grad():
                z_BF = theirs.encode(x_BD)
                torch.testing.assert_close(ours.encode(x_BD).to_dense(), z_BF, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(ours.reconstruct(x_BD)[0], theirs.decode(z_BF), rtol=1e-5, atol=1e-4)
            assert saelens.look(place).scale == 0.25


def test_heads_side_by_side(tmp_path):
    """hook_z: SAELens flattens [.., heads, width] to what layers.L.attn.z is."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_class("standard")
    config = config_class(d_in=D, d_sae=F, reshape_activations="hook_z",
                          metadata=SAEMetadata(model_name="tiny", hook_name="blocks.3.attn.hook_z"))
    theirs = random_parameters(sae_class(config))
    theirs.save_model(tmp_path)
    opened, x_BD = saelens.read(Here(tmp_path)), rows()
    assert opened.site == Site(3, "attn.z")
    with torch.no_grad():
        z_BF = theirs.encode(x_BD.view(ROWS, 4, D // 4))
        torch.testing.assert_close(opened.sae.encode(x_BD).to_dense(), z_BF, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(opened.sae.reconstruct(x_BD)[0], theirs.decode(z_BF).view(ROWS, D), rtol=1e-5,
                                   atol=1e-5)


@pytest.mark.parametrize(("architecture", "settings"), [
    ("topk", {"k": 7}), ("abstopk", {"k": 7}), ("standard", {}), ("jumprelu", {}), ("gated", {}),
    ("topk", {"k": 7, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}),
    ("jumprelu", {"normalize_activations": "layer_norm"})])
def test_what_is_looked_at_is_what_is_read(tmp_path, architecture, settings):
    place = Here(theirs_in(tmp_path, architecture, **settings))
    reading, opened = saelens.look(place), saelens.read(place)
    sae = opened.sae
    assert (reading.d_in, reading.d_sae, reading.k) == (sae.d_in, sae.d_sae, getattr(sae, "k", None))
    assert (reading.reads, reading.normalize, reading.model_name) == (sae.reads, sae.normalize, "tiny")
    assert reading.centred == settings.get("apply_b_dec_to_input", True) == (sae.b_in is sae.b_out)
    assert reading.unit_rows == ("rescale_acts_by_decoder_norm" in settings) == ("p ‖W_dec‖" in reading.formula()[1])
    change(tmp_path, d_sae=95)
    with pytest.raises(UserError, match="says 24, 95"):
        saelens.look(place)
