"""The contract of a coder: its inputs, outputs and refusals; its state; moving it between devices and dtypes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from coders import KINDS, OWN, K, coder_of, dense, parameters, settings
from olmoscope.errors import UserError
from olmoscope.kernels import reference
from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.threshold import JumpReLU
from olmoscope.sae.topk import TopK

D, F = 6, 20
kinds = pytest.mark.parametrize("kind", KINDS)
ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rows(*shape, seed=7):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 0.5


def coder(kind="topk", normalize="none", **changes):
    return coder_of(kind, parameters(kind, D, D, F) | changes, normalize)


@kinds
@pytest.mark.filterwarnings("ignore:std")  # torch's, of a standard deviation of no rows
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 3, 4), (0,), (2, 0)])
def test_any_leading_dimensions(kind, normalize, lead):
    one, x = coder(kind, normalize), rows(*lead)
    codes = one.encode(x)
    places = codes.values.shape[-1]
    assert codes.values.shape == codes.indices.shape == (*lead, places) and codes.d_sae == F
    assert codes.to_dense().shape == (*lead, F) and codes.l0().shape == lead
    z_NF, y_ND = dense(kind, parameters(kind, D, D, F), x.reshape(-1, D), normalize)
    torch.testing.assert_close(codes.to_dense(), z_NF.view(*lead, F))
    assert torch.equal(codes.l0(), z_NF.count_nonzero(dim=1).view(lead))
    torch.testing.assert_close(one.decode(codes), y_ND.view(*lead, D))
    torch.testing.assert_close(one.reconstruct(x)[0], y_ND.view(*lead, D))


def test_a_row_of_many_is_as_it_is_alone():
    one, x = coder("topk", "layer_norm"), rows(2, 3)
    whole = one.encode(x)
    alone = one.encode(x[1, 2])
    torch.testing.assert_close(whole.values[1, 2], alone.values)
    assert torch.equal(whole.indices[1, 2], alone.indices)
    torch.testing.assert_close(one.decode(whole)[1, 2], one.decode(alone))


@kinds
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_rows_of_any_float_dtype(kind, dtype):
    """They are converted to the parameters' dtype."""
    one, x = coder(kind), rows(5).to(dtype)
    codes = one.encode(x)
    assert codes.values.dtype == one.dtype == torch.float64
    torch.testing.assert_close(codes.to_dense(), dense(kind, one.state_dict(), x.double())[0])


@kinds
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_parameters_of_any_float_dtype(kind, dtype):
    """Plain torch computes in dtypes that the kernels do not take."""
    one = coder(kind, "layer_norm").to(dtype=dtype)
    assert {tensor.dtype for tensor in one.state_dict().values()} == {dtype}
    assert (one.kernels is reference) == (dtype in (torch.bfloat16, torch.float16))
    y, codes = one.reconstruct(rows(2, 3))
    assert y.dtype == codes.values.dtype == dtype and y.shape == (2, 3, D)
    exact = one.to(dtype=torch.float64).reconstruct(rows(2, 3).to(dtype))[0]
    assert (y.double() - exact).abs().max() < 40 * torch.finfo(dtype).eps * exact.abs().max()
    if dtype != torch.float64:
        x = rows(4).to(dtype).requires_grad_()
        one.W_dec.requires_grad_()
        one.reconstruct(x)[0].sum().backward()
        assert x.grad.isfinite().all() and one.W_dec.grad.dtype == dtype and one.W_dec.grad.any()


@pytest.mark.parametrize(("x", "message"), [
    (np.zeros((3, D), np.float32), r"x is not a torch tensor but ndarray: pass torch.from_numpy\(x\)"),
    ([[0.0] * D], r"x is not a torch tensor but list: pass torch.as_tensor\(x\)"),
    (None, "x is not a torch tensor but NoneType"),
    (torch.zeros(3, D, dtype=torch.int64), r"x has dtype torch.int64, .* x.float\(\)"),
    (torch.zeros(3, D, dtype=torch.bool), "x has dtype torch.bool"),
    (torch.zeros(3, D, dtype=torch.complex64), "x has dtype torch.complex64"),
    (torch.zeros(3, D + 1), r"x is \[3, 7\]; this coder reads rows of width 6, along the last dimension"),
    (torch.zeros(D, 3), "reads rows of width 6"),
    (torch.tensor(1.0), r"x is \[\]"),
    (torch.zeros(3, D, device="meta"), r"x is on meta, but the coder is on cpu: move one .* coder.to\('meta'\)"),
])
def test_what_cannot_be_encoded_is_refused(x, message):
    for call in (coder().encode, coder().reconstruct):
        with pytest.raises(UserError, match=message) as refusal:
            call(x)
        assert "\n" not in str(refusal.value)


def codes(values=(3, K), indices=(3, K), d_sae=F, **options):
    return SparseCodes(torch.zeros(values, **options), torch.zeros(indices, dtype=torch.int64, **options), d_sae)


@pytest.mark.parametrize(("given", "message"), [
    (torch.zeros(3, F), "takes the SparseCodes that encode gives, not Tensor"),
    (codes(d_sae=F + 1), "the codes have 21 latents, but this coder has 20"),
    (codes((3, K), (3, K + 1)), r"codes.values is \[3, 4\], codes.indices \[3, 5\] of torch.int64"),
    (codes((), ()), r"codes.values is \[\]"),
    (codes(device="meta"), "codes.values is on meta, but the coder is on cpu"),
    (SparseCodes(np.zeros((3, K)), torch.zeros(3, K, dtype=torch.int64), F), "codes.values is not a torch tensor"),
    (SparseCodes(torch.zeros(3, K), torch.zeros(3, K, dtype=torch.int32), F), "of torch.int32"),
])
def test_what_cannot_be_decoded_is_refused(given, message):
    with pytest.raises(UserError, match=message) as refusal:
        coder().decode(given)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale", "centred"])
def test_codes_carry_the_scale_of_their_rows(normalize):
    """Edited codes decode in the units of the same rows; codes made by hand have no such units."""
    one, x = coder("topk", normalize), rows(2, 3)
    given = one.encode(x)
    y = one.decode(given)
    doubled = one.decode(replace(given, values=given.values * 2))
    off = one.decode(replace(given, values=torch.zeros_like(given.values)))
    torch.testing.assert_close(doubled - off, 2 * (y - off))  # affine in the values
    with pytest.raises(UserError, match=f"scale of each row, which a {normalize} SAE restores: .*dataclasses.replace"):
        one.decode(SparseCodes(given.values, given.indices, F))
    with pytest.raises(UserError, match=r"codes\.values has 3 rows, but encode was given 6"):
        one.decode(replace(given, values=given.values[0], indices=given.indices[0]))


def test_codes_made_by_hand_decode_where_nothing_else_is_needed():
    one = coder()
    y = one.decode(SparseCodes(torch.tensor([[2.0, 1.0]]), torch.tensor([[5, 7]]), F))
    torch.testing.assert_close(y, 2 * one.W_dec[5:6] + one.W_dec[7:8] + one.b_out)


@kinds
@pytest.mark.parametrize(("ends", "tied"), [("same", True), ("same", False), ("other", False), ("skip", False)])
def test_state_goes_out_and_back(kind, ends, tied):
    """Each tensor once, under the names that checkpoints have; ties stay ties."""
    state = parameters(kind, D, D, F, ends=ends, tied=tied)
    one = coder_of(kind, state, "layer_norm", ends)
    names = [*(["W"] if tied else ["W_enc", "W_dec"]), *OWN[kind],
             *(["b_pre"] if ends == "same" else ["b_in", "b_out"]), *(["W_skip"] if ends == "skip" else [])]
    assert list(one.state_dict()) == names
    assert all(tensor is state[name] for name, tensor in one.state_dict().items())
    assert one.tied == tied and (one.b_in is one.b_out) == (ends == "same")
    moved = one.to("cpu", torch.float32)
    assert type(moved) is type(one) and moved.tied == tied and (moved.b_in is moved.b_out) == (ends == "same")
    assert moved.transcoder == one.transcoder and moved.normalize == "layer_norm"
    assert {tensor.dtype for tensor in moved.state_dict().values()} == {torch.float32}
    assert one.dtype == torch.float64
    other = coder_of(kind, parameters(kind, D, D, F, ends=ends, tied=tied, seed=1), "layer_norm", ends)
    before = other.W_enc
    assert not torch.equal(other.reconstruct(rows(4))[0], one.reconstruct(rows(4))[0])
    other.load_state_dict(one.state_dict())
    assert other.W_enc is before and torch.equal(other.reconstruct(rows(4))[0], one.reconstruct(rows(4))[0])


def test_a_move_keeps_what_wants_a_gradient():
    one = coder()
    one.W_enc.requires_grad_()
    moved = one.to(dtype=torch.float32)
    assert moved.W_enc.requires_grad and moved.W_enc.is_leaf and not moved.W_dec.requires_grad


def test_state_of_another_coder_is_refused():
    one, before = coder(), coder().state_dict()
    for state, message in (
            ({}, "holds W_enc, W_dec, b_latent, b_pre, but the state has no tensors"),
            (coder("jumprelu").state_dict(), "but the state has W_enc, W_dec, b_latent, threshold, b_pre"),
            (one.state_dict() | {"W_enc": torch.ones(F, D), "W_dec": torch.ones(F + 1, D)}, r"W_dec is \[21, 6\]")):
        with pytest.raises(UserError, match=message):
            one.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())


def test_a_dtype_that_is_no_float_is_refused():
    with pytest.raises(UserError, match=r"to\(torch.int8\): a coder's parameters have a float dtype"):
        coder().to(dtype=torch.int8)


@pytest.mark.parametrize(("changes", "message"), [
    ({"b_in": torch.zeros(D + 1)}, r"TopK: b_in is \[7\]; with W_enc \[20, 6\] and W_dec \[20, 6\] it must be \[6\]"),
    ({"b_latent": torch.zeros(D)}, r"b_latent is \[6\]; .* must be \[20\]"),
    ({"W_dec": torch.zeros(F + 1, D)}, r"W_enc is \[20, 6\]; .* must be \[21, 6\]"),
    ({"W_dec": torch.zeros(F, D + 1)}, "reads rows of width 6, but W_dec writes 7.* pass transcoder=True"),
    ({"W_skip": torch.zeros(D, D)}, "only a transcoder has a W_skip"),
    ({"W_skip": torch.zeros(D, F), "transcoder": True}, r"W_skip is \[6, 20\]; .* must be \[6, 6\]"),
    ({"reads": ("layers.7.mlp.in",)}, "reads layers.7.mlp.in and writes unnamed sites"),
])
def test_parameters_that_do_not_fit_together_are_refused(changes, message):
    fitting = {"W_enc": torch.zeros(F, D), "W_dec": torch.zeros(F, D), "b_in": torch.zeros(D), "normalize": "none",
               "b_latent": torch.zeros(F), "k": K}
    TopK(**fitting)
    with pytest.raises(UserError, match=message) as refusal:
        TopK(**fitting | changes)
    assert "\n" not in str(refusal.value)


def test_sites_are_kept():
    where = {"reads": ("layers.7.mlp.in",), "writes": ("layers.7.mlp.out",)}
    one = JumpReLU.from_state_dict(parameters("jumprelu", D, D, F, ends="other"), **settings("jumprelu", ends="other"),
                                   **where)
    moved = one.to(dtype=torch.float32)
    assert (moved.reads, moved.writes) == (where["reads"], where["writes"])
    assert coder().reads == coder().writes == ()


def test_a_coder_is_shown_in_one_line_and_can_be_a_key():
    one = coder()
    assert repr(one) == "TopK(width 6, 20 latents, normalize none)" and {one: 1}[one] == 1
    other = coder_of("jumprelu", parameters("jumprelu", D, 4, F, ends="other"), ends="other")
    assert repr(other) == "JumpReLU(width 6 to 4, 20 latents, normalize none)"
