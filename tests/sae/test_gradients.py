"""Gradients through encode and decode of every kind, against float64 autograd of plain dense torch.

Shapes: N rows, D_in width read, D_out width written, F latents.
"""

from dataclasses import replace

import pytest
import torch

from coders import KINDS, WITHOUT_GRADIENT, K, coder_of, dense, parameters
from olmoscope.kernels.dispatch import VARIABLE
from olmoscope.sae.codes import SparseCodes

N, D_IN, D_OUT, F = 9, 6, 5, 20
NORMALIZE = ("none", "layer_norm", "constant_norm_rescale", "centred")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["cpu", "reference", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")])])
def device(request, monkeypatch):
    """With each set of kernels, where they run."""
    monkeypatch.setenv(VARIABLE, request.param)
    return torch.device("cuda" if request.param == "cuda" else "cpu")


def rows(seed=7, n=N, width=D_IN):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) * 2 + 0.5


def widths(ends, tied):
    return (D_IN, D_IN) if ends == "same" or tied else (D_IN, D_OUT)


def leaves(tensors, device):
    return {name: tensor.detach().clone().to(device).requires_grad_() for name, tensor in tensors.items()}


def weighted(tensor, seed):
    """A sum that gives every element a gradient of its own."""
    generator = torch.Generator().manual_seed(seed)
    return (tensor * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)).sum()


def assert_same_gradients(ours, theirs):
    for name, wanted in theirs.items():
        if name in WITHOUT_GRADIENT:
            assert ours[name].grad is None and (wanted.grad is None or not wanted.grad.any())
            continue
        assert wanted.grad is not None and wanted.grad.any(), name
        torch.testing.assert_close(ours[name].grad, wanted.grad, rtol=1e-10, atol=1e-10, msg=name)


@kinds
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize(("ends", "tied"), [("same", True), ("same", False), ("other", False), ("skip", False)])
def test_equal_autograd_of_plain_torch(kind, normalize, ends, tied, device):
    """Through codes and reconstruction at once, with respect to the rows and to every parameter."""
    state = parameters(kind, *widths(ends, tied), F, ends=ends, tied=tied)
    ours, theirs = leaves(state | {"x": rows()}, device), leaves(state | {"x": rows()}, device)
    x = ours.pop("x")
    coder = coder_of(kind, ours, normalize, ends)
    codes = coder.encode(x)
    y = coder.decode(codes)
    z_NF, y_ND = dense(kind, theirs, theirs["x"], normalize, ends)
    torch.testing.assert_close(codes.to_dense(), z_NF, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y, y_ND, rtol=1e-10, atol=1e-10)
    assert 0 < (z_NF > 0).double().mean() < 0.9
    (weighted(codes.to_dense(), 1) + weighted(y, 2)).backward()
    (weighted(z_NF, 1) + weighted(y_ND, 2)).backward()
    assert_same_gradients(ours | {"x": x}, theirs)


@kinds
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_gradcheck(kind, normalize):
    """Checked by finite differences, at a point where they cross no threshold and no tie."""
    state = {name: tensor for name, tensor in parameters(kind, D_IN, D_OUT, F, ends="skip").items()}
    fixed = {name: tensor for name, tensor in state.items() if name in WITHOUT_GRADIENT}
    names = [name for name in state if name not in fixed]

    def function(x, *tensors):
        coder = coder_of(kind, fixed | dict(zip(names, tensors, strict=True)), normalize, "skip")
        codes = coder.encode(x)
        return codes.values, coder.decode(codes)

    x = rows(n=3)
    before = function(x, *(state[name] for name in names))[0] > 0
    moved = function(x + 1e-4, *(state[name] + 1e-4 for name in names))[0] > 0
    assert torch.equal(before, moved), "too near to a threshold: another seed"
    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in (x, *(state[n] for n in names))])


def test_gradients_of_codes_by_themselves(device):
    """Decoding is linear: a place whose value is 0 also has a gradient, and so does a negative value that a user put
    there. The matrix gets the gradients of all places of a latent, even of two in one row."""
    state = parameters("topk", D_IN, D_IN, F)
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(N, K, generator=generator, dtype=torch.float64)
    values[:, 1] = 0
    indices = torch.randint(F, (N, K), generator=generator)
    indices[0, 2] = indices[0, 3]
    ours, theirs = leaves(state | {"values": values}, device), leaves(state | {"values": values}, device)
    indices = indices.to(device)
    z, mine = ours.pop("values"), coder_of("topk", ours)
    y = mine.decode(SparseCodes(z, indices, F))
    z_NF = torch.zeros(N, F, dtype=torch.float64, device=device).scatter_add(1, indices, theirs["values"])
    y_ND = z_NF @ theirs["W_dec"] + theirs["b_pre"]
    torch.testing.assert_close(y, y_ND)
    weighted(y, 0).backward()
    weighted(y_ND, 0).backward()
    assert z.grad[:, 1].all()
    for got, wanted in ((z, theirs["values"]), (ours["W_dec"], theirs["W_dec"]), (ours["b_pre"], theirs["b_pre"])):
        torch.testing.assert_close(got.grad, wanted.grad)
    assert ours["W_enc"].grad is None


def test_shut_places_pass_no_gradient_back(device):
    """The ReLU after a top-k: if fewer than k pre-activations are over 0, the other places belong to no latent."""
    state = parameters("topk", D_IN, D_IN, F)
    state["b_latent"] -= 4
    ours, theirs = leaves(state | {"x": rows()}, device), leaves(state | {"x": rows()}, device)
    x = ours.pop("x")
    codes = coder_of("topk", ours).encode(x)
    assert (codes.values == 0).any() and (codes.values > 0).any()
    codes.values.sum().backward()
    dense("topk", theirs, theirs["x"])[0].sum().backward()
    for name in ("W_enc", "b_latent", "b_pre"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)
    torch.testing.assert_close(x.grad, theirs["x"].grad)


def test_codes_used_twice_and_rows_that_are_not_contiguous(device):
    state = parameters("topk", D_IN, D_IN, F)
    base = rows(n=2 * N).T.contiguous().to(device).requires_grad_()
    x = base.T[::2]
    assert not x.is_contiguous()
    coder = coder_of("topk", leaves(state, device))
    codes = coder.encode(x)
    edited = replace(codes, values=codes.values * 2)
    loss = coder.decode(codes).square().sum() + coder.decode(edited).sum() + codes.values.sum()
    loss.backward()
    theirs = leaves(state, device)
    again = base.detach().clone().requires_grad_()
    z_NF, y_ND = dense("topk", theirs, again.T[::2])
    twice_ND = 2 * z_NF @ theirs["W_dec"] + theirs["b_pre"]
    (y_ND.square().sum() + twice_ND.sum() + z_NF.sum()).backward()
    torch.testing.assert_close(base.grad, again.grad)
    for name, tensor in coder.state_dict().items():
        torch.testing.assert_close(tensor.grad, theirs[name].grad, msg=name)


def test_leading_dimensions_and_dtypes_pass_gradients(device):
    """`[B, T, D]` in bfloat16: the rows get theirs in their own dtype."""
    coder = coder_of("topk", parameters("topk", D_IN, D_IN, F)).to(device, torch.float32)
    x = rows(n=6).view(2, 3, D_IN).to(device, torch.bfloat16).requires_grad_()
    coder.encode(x).values.sum().backward()
    assert x.grad.shape == x.shape and x.grad.dtype == torch.bfloat16 and x.grad.any()


@kinds
def test_what_is_not_asked_for_is_not_kept(kind, device):
    state = parameters(kind, D_IN, D_IN, F)
    plain = coder_of(kind, {name: tensor.to(device) for name, tensor in state.items()})
    wanting = coder_of(kind, leaves(state, device))
    x = rows().to(device)
    y, codes = plain.reconstruct(x)
    assert not y.requires_grad and not codes.values.requires_grad
    for coder, given in ((wanting, x), (plain, x.clone().requires_grad_())):
        with torch.no_grad():
            y_off, codes_off = coder.reconstruct(given)
        y_on, codes_on = coder.reconstruct(given)
        assert y_off.grad_fn is None and codes_off.values.grad_fn is None and y_on.requires_grad
        for one in (codes_off, codes_on):
            assert torch.equal(one.values, codes.values) and torch.equal(one.indices, codes.indices)
        assert torch.equal(y_off, y) and torch.equal(y_on.detach(), y)
        with torch.inference_mode():
            assert torch.equal(coder.reconstruct(given)[0], y)


def test_attribution_needs_only_the_gradient_of_the_rows(device):
    """Only x needs a gradient, so none is computed for a matrix."""
    coder = coder_of("topk", {name: tensor.to(device) for name, tensor in parameters("topk", D_IN, D_IN, F).items()})
    x = rows().to(device).requires_grad_()
    coder.encode(x).values.sum().backward()
    assert x.grad is not None and all(tensor.grad is None for tensor in coder.state_dict().values())


def test_fine_tuning_by_an_optimiser_of_torch():
    """A few steps of Adam improve the reconstruction."""
    coder = coder_of("topk", parameters("topk", D_IN, D_IN, F)).to(dtype=torch.float32)
    weights = [tensor.requires_grad_() for tensor in coder.state_dict().values()]
    optimiser, x = torch.optim.Adam(weights, lr=0.02), rows(n=200).float()
    losses = []
    for _ in range(60):
        loss = (coder.reconstruct(x)[0] - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_same_input_same_bits():
    """More rows than a piece of the CPU's work, float32."""
    found = []
    for _ in range(2):
        coder = coder_of("topk", leaves(parameters("topk", 16, 16, 64, dtype=torch.float32), "cpu"))
        x = rows(n=300, width=16).float().requires_grad_()
        coder.reconstruct(x)[0].square().sum().backward()
        found.append([x.grad, *(tensor.grad for tensor in coder.state_dict().values())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_values_and_gradients_are_those_of_saelens(architecture, normalize):
    """The real one in float64: of `decode(encode(x))`, and of the codes, with respect to rows and parameters."""
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(architecture)
    extra = {"k": K} if architecture == "topk" else {}
    theirs = sae_class(config_class(d_in=D_IN, d_sae=F, dtype="float64", normalize_activations=normalize, **extra))
    kind = "jumprelu" if architecture == "standard" else architecture
    state = parameters(kind, D_IN, D_IN, F)
    if architecture == "standard":
        state["threshold"].zero_()
    names = {"W_enc": "W_enc", "W_dec": "W_dec", "b_pre": "b_dec", "b_latent": "b_enc", "threshold": "threshold",
             "b_gate": "b_gate", "b_mag": "b_mag", "r_mag": "r_mag"}
    shared = {ours: getattr(theirs, name) for ours, name in names.items() if ours in state and hasattr(theirs, name)}
    with torch.no_grad():
        for ours, parameter in shared.items():
            parameter.copy_(state[ours].T if ours == "W_enc" else state[ours])
    mine = leaves(state, "cpu")
    coder = coder_of(kind, mine, normalize)
    x, x_theirs = rows().requires_grad_(), rows().requires_grad_()
    codes = coder.encode(x)
    y = coder.decode(codes)
    z_theirs = theirs.encode(x_theirs)
    y_theirs = theirs.decode(z_theirs)
    torch.testing.assert_close(codes.to_dense(), z_theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y, y_theirs, rtol=1e-9, atol=1e-9)
    (weighted(codes.to_dense(), 1) + weighted(y, 2)).backward()
    (weighted(z_theirs, 1) + weighted(y_theirs, 2)).backward()
    torch.testing.assert_close(x.grad, x_theirs.grad, rtol=1e-9, atol=1e-9)
    for ours, parameter in shared.items():
        if ours in WITHOUT_GRADIENT:
            assert mine[ours].grad is None
            continue
        wanted = parameter.grad.T if ours == "W_enc" else parameter.grad
        torch.testing.assert_close(mine[ours].grad, wanted, rtol=1e-9, atol=1e-9, msg=ours)


def test_second_derivatives_are_refused():
    """torch refuses it in its own words; the result is not silently wrong."""
    coder = coder_of("topk", parameters("topk", D_IN, D_IN, F))
    x = rows().requires_grad_()
    (first,) = torch.autograd.grad(coder.reconstruct(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
