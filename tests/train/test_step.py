"""The step's gradients against autograd in float64, and whole trajectories against a dense torch trainer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_backends import BACKENDS, DEVICE, FEW, SLOW, backend
from olmoscope.kernels import reference
from olmoscope.kernels.interface import Kernels
from olmoscope.sae.io.checkpoint import read_checkpoint
from olmoscope.sae.normalize import normalize_rows, restore_rows
from olmoscope.sae.topk import TopK
from olmoscope.train.adam import Adam
from olmoscope.train.checkpoint import load_checkpoint, save_checkpoint
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.initialize import initialize
from olmoscope.train.step import Step


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(DEVICE)


def double(sae: TopK) -> TopK:
    return sae.to(dtype=torch.float64)


def fresh(d_model, d_sae, k, normalize, seed=0, tied=True) -> TopK:
    """Untied: encoder and decoder differ."""
    generator = torch.Generator().manual_seed(seed)
    mean_D = torch.randn(d_model, generator=generator).to(DEVICE)
    sae = double(initialize(d_model, d_sae, k, normalize, mean_D, seed, tied=tied))
    sae.b_latent += randn(generator, d_sae) * 0.1
    if not tied:
        sae.W_enc += randn(generator, d_sae, d_model) * 0.3
    return sae


def dense_loss(x_BD: Tensor, parameters: list[Tensor], k: int, normalize: str) -> Tensor:
    """The reference recipe's loss, written densely for autograd; parameters in the order of `TopK.parameters`."""
    W_enc_FD, W_dec_FD, b_latent_F, b_pre_D = parameters if len(parameters) == 4 else [parameters[0], *parameters]
    n_BD, statistics = normalize_rows(x_BD, normalize)
    pre_BF = (n_BD - b_pre_D) @ W_enc_FD.T + b_latent_F
    top = pre_BF.topk(k, dim=1)
    z_BF = torch.zeros_like(pre_BF).scatter(1, top.indices, top.values).relu()
    xhat_BD = restore_rows(z_BF @ W_dec_FD + b_pre_D, statistics)
    return ((xhat_BD - x_BD).square().sum(1) / x_BD.square().sum(1)).mean()


class DenseTrainer:
    """Autograd, torch.optim.Adam, projection and renormalisation, all dense."""

    def __init__(self, sae: TopK, lr: float, decoder_rate: float = 1.0, bias_rate: float = 1.0) -> None:
        self.sae = sae
        self.parameters = [p.clone().requires_grad_() for p in sae.state_dict().values()]
        *encoder, decoder, b_latent, b_pre = self.parameters
        self.optimizer = torch.optim.Adam([{"params": encoder or [decoder], "lr": lr},
                                           {"params": [decoder] if encoder else [], "lr": decoder_rate * lr},
                                           {"params": [b_latent, b_pre], "lr": bias_rate * lr}])

    def __call__(self, x_BD: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = dense_loss(x_BD, self.parameters, self.sae.k, self.sae.normalize)
        loss.backward()
        W_FD = self.parameters[-3]
        with torch.no_grad():
            W_FD.grad -= (W_FD.grad * W_FD).sum(1, keepdim=True) * W_FD
        self.optimizer.step()
        with torch.no_grad():
            W_FD /= W_FD.norm(dim=1, keepdim=True)
        return float(loss.detach())


def gradients(sae: TopK, x_BD: Tensor, kernels: Kernels) -> dict[str, Tensor]:
    """With β₁ = 0 the first moment is the gradient."""
    step = Step(sae, Adam((0.0, 0.999), 1e-8), kernels=kernels)
    step(x_BD, lr=1.0)
    return {name: moments.first for name, moments in step.moments.items()}


@pytest.fixture(params=BACKENDS, scope="module")
def kernels(request):
    yield from backend(request.param)


@settings(max_examples=8 if FEW else 40, deadline=None)
@given(d_model=st.integers(2, 33), d_sae=st.integers(1, 70), rows=st.integers(1, 40), seed=st.integers(0, 2**31),
       normalize=st.sampled_from(["none", "layer_norm"]), k_share=st.floats(0, 1), shift=st.sampled_from([0.0, -50.0]),
       tied=st.booleans())
def test_gradients_equal_autograd(kernels, d_model, d_sae, rows, seed, normalize, k_share, shift, tied):
    k = max(1, round(k_share * d_sae))
    sae = fresh(d_model, d_sae, k, normalize, seed, tied)
    sae.b_latent += shift  # a large negative bias: no latent is active in any row
    x_BD = randn(torch.Generator().manual_seed(seed + 1), rows, d_model)
    parameters = [p.clone().requires_grad_() for p in sae.state_dict().values()]
    expected = list(torch.autograd.grad(dense_loss(x_BD, parameters, k, normalize), parameters))
    expected[-3] -= (expected[-3] * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    # Rows of two numbers have one distinct value after a layer norm: gradients of 1e5 and more, hence the relative bar.
    for (name, got), want in zip(gradients(sae, x_BD, kernels).items(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11 * (1 + float(want.abs().max())), msg=name)


def test_gradients_over_several_chunks_of_rows_and_latents(monkeypatch):
    whole = gradients(fresh(24, 500, 5, "none"), x_BD := randn(torch.Generator(), 300, 24), reference)
    monkeypatch.setattr("olmoscope.kernels.reference.PRE_ACTIVATIONS_AT_ONCE", 7 * 500)
    monkeypatch.setattr("olmoscope.kernels.reference.GRADIENT_AT_ONCE", 33 * 24)
    for name, gradient in gradients(fresh(24, 500, 5, "none"), x_BD, reference).items():
        torch.testing.assert_close(gradient, whole[name], msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("rates", [{}, {"decoder_rate": 3.0, "scale_biases": True}])
def test_trajectory_equals_a_dense_trainer(kernels, rates, normalize, tied):
    sae, rows = fresh(16, 64, 4, normalize, tied=tied), 10 if SLOW else 50
    generator = torch.Generator().manual_seed(3)
    batches = [7 * randn(generator, rows, 16) + 1 for _ in range(3 if SLOW else 30)]
    unit = float((normalize_rows(batches[0], normalize)[0] - sae.b_in).square().mean().sqrt()) if rates else 1.0
    dense = DenseTrainer(sae, 1e-2, rates.get("decoder_rate", 1.0), unit)
    step = Step(sae, Adam((0.9, 0.999), 1e-8, **rates), kernels=kernels)
    for x_BD in batches:
        loss = dense(x_BD)
        step(x_BD, lr=1e-2)
        assert step.take_sums()[0] / rows == pytest.approx(loss, rel=1e-9)
    for got, want in zip(sae.state_dict().values(), dense.parameters, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64, dtype=torch.float64, device=DEVICE))


def test_the_unit_of_the_activations_does_not_matter():
    """Rows 1000 times as large: the same matrices, biases 1000 times as large."""
    generator = torch.Generator().manual_seed(4)
    rows = [randn(generator, 50, 16) + 1 for _ in range(30)]
    found = []
    for unit in (1.0, 1000.0):
        sae = fresh(16, 64, 4, "none", tied=False)
        sae.b_latent.mul_(unit)
        sae.b_in.mul_(unit)
        step = Step(sae, Adam((0.9, 0.999), 1e-30, decoder_rate=8.0, scale_biases=True),
                    SettledAuxiliary(k=4, dead_window=200))
        for x_BD in rows:
            step(x_BD * unit, lr=1e-2)
        found.append([sae.W_enc, sae.W_dec, sae.b_latent / unit, sae.b_in / unit])
    for large, small in zip(*found, strict=True):
        torch.testing.assert_close(large, small, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_dense_is_made(kernels, monkeypatch, tied):
    """The largest tensor of a step stays far under [B, F] and [F, D]."""
    monkeypatch.setattr(kernels, "PRE_ACTIVATIONS_AT_ONCE", 2**10)
    monkeypatch.setattr(kernels, "ROWS_AT_LEAST", 1, raising=False)
    monkeypatch.setattr(kernels, "SHARES", 7, raising=False)  # a GPU has more shares than this SAE has latents
    monkeypatch.setattr("olmoscope.kernels.reference.GRADIENT_AT_ONCE", 2**10)
    rows, d_model, d_sae = 32, 16, 256
    step = Step(fresh(d_model, d_sae, 4, "none", tied=tied), Adam((0.9, 0.999), 1e-8), kernels=kernels)
    x_BD = randn(torch.Generator(), rows, d_model)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            known = {a.data_ptr() for a in args if isinstance(a, Tensor) and a.layout == torch.strided}
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.data_ptr() not in known:
                    largest = max(largest, tensor.numel())
            return out

    with Largest():
        step(x_BD, lr=1e-3)
    assert 0 < largest <= 2 * 2**10 < d_sae * d_model < rows * d_sae


def test_dead_latents_are_counted_in_tokens(kernels):
    sae = fresh(8, 16, 2, "none")
    sae.b_latent[3] = -1000
    step = Step(sae, Adam((0.9, 0.999), 1e-8), kernels=kernels)
    x_BD = randn(torch.Generator(), 30, 8)
    step(x_BD, lr=0)
    assert step.dead_share(31) is None, "too few tokens to know"
    fired = sae.encode(x_BD)
    expected = 1 - len(fired.indices[fired.values > 0].unique()) / 16
    assert step.dead_share(30) == pytest.approx(expected)
    assert expected >= 1 / 16


@pytest.mark.skipif(SLOW, reason="hundreds of steps")
@pytest.mark.parametrize(("rows", "moments", "tied"), [
    ("touched", "float32", True), ("exact", "bfloat16", True), ("touched", "bfloat16", True),
    ("touched", "bfloat16", False)])
def test_cheaper_adams_learn_as_well(kernels, rows, moments, tied):
    """Rows made of a few directions: after the same steps, the loss is within 5% of exact Adam's."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator))
    losses = []
    for adam in (Adam((0.9, 0.999), 1e-8), Adam((0.9, 0.999), 1e-8, rows, moments)):
        sae = initialize(16, 64, 3, "none", torch.zeros(16, device=DEVICE), 0, tied=tied)
        step = Step(sae, adam, kernels=kernels)
        draw = torch.Generator().manual_seed(1)
        for count in range(300):
            places = torch.rand(64, 40, generator=draw).topk(3).indices
            x_BD = directions[places].mul(1 + torch.rand(64, 3, 1, generator=draw)).sum(1)
            step(x_BD.to(DEVICE), lr=1e-2 * min(1.0, (300 - count) / 100))
            if count == 249:
                step.take_sums()
        losses.append(step.take_sums()[0] / (50 * 64))
    assert losses[0] < 0.22, "0.19 to 0.21, by where the SAE starts"
    assert losses[1] < 1.05 * losses[0]


@pytest.mark.parametrize("adam", [Adam((0.9, 0.999), 1e-8), Adam((0.9, 0.999), 1e-8, "touched", "bfloat16")])
@pytest.mark.parametrize(("auxiliary", "tied"), [(None, True), (SettledAuxiliary(dead_window=60, k=5), True),
                                                 (SettledAuxiliary(dead_window=60, k=5), False)])
def test_a_checkpoint_goes_on_bit_for_bit(adam, auxiliary, tied, tmp_path):
    def batches(numbers):
        return [torch.randn(30, 16, generator=torch.Generator().manual_seed(number)).to(DEVICE) for number in numbers]

    def step():
        return Step(initialize(16, 256, 3, "none", torch.zeros(16, device=DEVICE), 0, tied=tied), adam, auxiliary)

    whole, first, second = step(), step(), step()
    for x_BD in batches(range(20)):
        whole(x_BD, lr=1e-2)
    for x_BD in batches(range(13)):
        first(x_BD, lr=1e-2)
    save_checkpoint(tmp_path / "checkpoint", first, {"place": 13})
    assert load_checkpoint(tmp_path / "checkpoint", second) == {"place": 13}
    for x_BD in batches(range(13, 20)):
        second(x_BD, lr=1e-2)
    assert second.tensors().keys() == whole.tensors().keys()
    for name, tensor in second.tensors().items():
        assert torch.equal(tensor, whole.tensors()[name]), name
    loaded = read_checkpoint(tmp_path / "checkpoint")
    assert loaded.tied == tied
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, first.sae.state_dict()[name].cpu()), name
    assert auxiliary is None or len(second.auxiliary.dead_M)
    assert second.take_sums() == whole.take_sums()
