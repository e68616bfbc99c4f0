"""An SAE that does not subtract its decoder's bias is unchanged after export to SAELens and back."""

import json

import pytest
import torch

from olmoscope.sae.io import saelens
from olmoscope.sae.io.place import Here
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK
from olmoscope.site import Site

D, F, K, ROWS = 24, 96, 7, 200
METADATA = {"model_name": "tiny", "hook_name": "blocks.3.hook_resid_post", "hf_hook_name": "model.layers.3",
            "prepend_bos": False}


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uncentred(kind, normalize):
    state = {"W_enc": randn(1, F, D), "W_dec": randn(2, F, D), "b_latent": randn(3, F), "b_in": torch.zeros(D),
             "b_out": randn(4, D)}
    if kind == "topk":
        sae = TopK.from_state_dict(state, k=K, normalize=normalize)
    else:
        sae = JumpReLU.from_state_dict(state | {"threshold": randn(5, F).abs()}, normalize=normalize)
    return sae.at((Site(3),), (Site(3),))


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_nothing_is_subtracted_there_either(tmp_path, kind, normalize):
    from sae_lens import SAE

    ours, x_BD = uncentred(kind, normalize), randn(0, ROWS, D) * torch.linspace(0.5, 3, D) + 2
    saelens.write(ours, tmp_path, METADATA)
    assert json.loads((tmp_path / "cfg.json").read_text())["apply_b_dec_to_input"] is False
    theirs = SAE.load_from_disk(tmp_path)
    assert theirs.cfg.apply_b_dec_to_input is False and torch.equal(theirs.b_dec, ours.b_out)
    out_BD, codes = ours.reconstruct(x_BD)
    with torch.no_grad():
        z_BF = theirs.encode(x_BD)
        torch.testing.assert_close(z_BF, codes.to_dense(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(theirs.decode(z_BF), out_BD, rtol=1e-5, atol=1e-4)
    theirs.save_model(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        found = saelens.read(Here(folder)).sae
        for name, tensor in ours.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), name
    assert not saelens.write(found, tmp_path, METADATA)
