"""Transcoders with any activation rule equal sae-lens' own classes.

Shapes: N rows, D_in width read, D_out width written, F latents.
"""

from dataclasses import replace

import pytest
import torch

from coders import KINDS, coder_of, dense, parameters
from olmoscope.errors import UserError
from olmoscope.sae.codes import SparseCodes

N, D_IN, D_OUT, F = 60, 12, 7, 40


def rows(seed=7):
    return torch.randn(N, D_IN, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def theirs_of(architecture, state, normalize="none", dtype="float32"):
    """sae-lens' transcoder of our parameters; it subtracts nothing before encoding."""
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(architecture)
    theirs = sae_class(config_class(d_in=D_IN, d_out=D_OUT, d_sae=F, dtype=dtype, normalize_activations=normalize,
                                    apply_b_dec_to_input=False))
    ours = {"W_enc": state["W_enc"].T, "b_enc": state["b_latent"], "W_dec": state["W_dec"], "b_dec": state["b_out"]}
    ours |= {name: state[name] for name in ("threshold", "W_skip") if hasattr(theirs, name)}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(ours.pop(name))
    assert not ours
    return theirs


def state_of(architecture, dtype=torch.float32):
    ends = "skip" if "skip" in architecture else "other"
    state = parameters("jumprelu", D_IN, D_OUT, F, ends=ends, dtype=dtype)
    state["b_in"].zero_()
    if not architecture.startswith("jumprelu"):
        state["threshold"].zero_()
    return ends, state


ARCHITECTURES = ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_agrees_with_saelens(architecture, normalize):
    ends, state = state_of(architecture)
    theirs, ours = theirs_of(architecture, state, normalize), coder_of("jumprelu", state, normalize, ends)
    with torch.no_grad():
        z_NF, y_ND = theirs.encode(rows()), theirs.forward(rows())
    y, codes = ours.reconstruct(rows())
    assert 0.02 < (z_NF > 0).double().mean() < 0.9 and y.shape == (N, D_OUT)
    assert (codes.to_dense() - z_NF).abs().max() <= 1e-6 * z_NF.abs().max()
    assert (y - y_ND).abs().max() <= 1e-6 * y_ND.abs().max()


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_agree_with_saelens(architecture, normalize):
    ends, state = state_of(architecture, torch.float64)
    theirs = theirs_of(architecture, state, normalize, "float64")
    mine = {name: tensor.requires_grad_() for name, tensor in state.items()}
    x, x_theirs = rows().double().requires_grad_(), rows().double().requires_grad_()
    coder_of("jumprelu", mine, normalize, ends).reconstruct(x)[0].square().sum().backward()
    theirs.forward(x_theirs).square().sum().backward()
    torch.testing.assert_close(x.grad, x_theirs.grad, rtol=1e-9, atol=1e-9)
    for name, parameter in (("W_enc", theirs.W_enc), ("W_dec", theirs.W_dec), ("b_latent", theirs.b_enc),
                            ("b_out", theirs.b_dec), ("W_skip", getattr(theirs, "W_skip", None))):
        if parameter is not None:
            wanted = parameter.grad.T if name == "W_enc" else parameter.grad
            torch.testing.assert_close(mine[name].grad, wanted, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("ends", ["other", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_every_rule(kind, ends):
    """What sae-lens has no class for, and a bias before the encoder, against plain torch."""
    state = parameters(kind, D_IN, D_OUT, F, ends=ends)
    ours = coder_of(kind, state, "layer_norm", ends)
    assert (ours.d_in, ours.d_out) == (D_IN, D_OUT)
    x = rows().double()
    z_NF, y_ND = dense(kind, state, x, "layer_norm", ends)
    codes = ours.encode(x.view(3, 20, D_IN))
    torch.testing.assert_close(codes.to_dense().view(N, F), z_NF)
    torch.testing.assert_close(ours.decode(codes).view(N, D_OUT), y_ND)


def test_the_skip_follows_the_rows_of_edited_codes():
    """The part of decode that does not come from latents stays the same; codes made by hand have no rows."""
    ends, state = state_of("skip_transcoder")
    ours = coder_of("jumprelu", state, ends=ends)
    codes = ours.encode(rows())
    nothing = ours.decode(replace(codes, values=torch.zeros_like(codes.values)))
    torch.testing.assert_close(nothing, rows() @ ours.W_skip.T + ours.b_out)
    with pytest.raises(UserError, match="do not hold the rows that W_skip reads"):
        ours.decode(SparseCodes(codes.values, codes.indices, F))


def test_a_normalised_transcoder_without_skip_decodes_codes_made_by_hand():
    """Its output belongs to another site, so no part of the rows read is added to it."""
    ends, state = state_of("transcoder")
    ours = coder_of("jumprelu", state, "layer_norm", ends)
    codes = ours.encode(rows())
    assert torch.equal(ours.decode(SparseCodes(codes.values, codes.indices, F)), ours.decode(codes))
