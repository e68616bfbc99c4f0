"""The step of a transcoder: its gradients against autograd of a dense model in float64, and what it learns."""

import pytest
import torch

from kernel_backends import BACKENDS, DEVICE, backend
from olmoscope.sae.topk import TopK
from olmoscope.train.adam import Adam
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.initialize import initialize_transcoder
from olmoscope.train.step import Step

F, K, ROWS, D_IN, D_OUT = 40, 5, 30, 12, 9


@pytest.fixture(params=BACKENDS, scope="module")
def kernels(request):
    yield from backend(request.param)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def fresh(skip, dtype=torch.float64):
    coder = initialize_transcoder(F, K, randn(1, D_IN), randn(2, D_OUT), 0, "a transcoder", skip=skip)
    state = {name: tensor.to(dtype) for name, tensor in coder.state_dict().items()}
    state["b_latent"] = 0.1 * randn(3, F).to(dtype)
    if skip:
        state["W_skip"] = 0.3 * randn(4, D_OUT, D_IN).to(dtype)
    for name in ("W_enc", "W_dec"):
        state[name] = state[name] / state[name].norm(dim=1, keepdim=True)
    return TopK.from_state_dict(state, k=K, normalize="none", transcoder=True)


def dense_loss(p, x_BD, y_BD):
    """Mean over rows of ‖ŷ − y‖² / ‖y‖², written from the formula."""
    pre_BF = (x_BD - p["b_in"]) @ p["W_enc"].T + p["b_latent"]
    top = pre_BF.topk(K, dim=1)
    z_BF = torch.zeros_like(pre_BF).scatter(1, top.indices, top.values.relu())
    yhat_BD = z_BF @ p["W_dec"] + p["b_out"]
    if "W_skip" in p:
        yhat_BD = yhat_BD + x_BD @ p["W_skip"].T
    return ((yhat_BD - y_BD).square().sum(1) / y_BD.square().sum(1)).mean()


@pytest.mark.parametrize("skip", [False, True])
def test_gradients_equal_autograd(kernels, skip):
    coder, x_BD, y_BD = fresh(skip), randn(5, ROWS, D_IN), randn(6, ROWS, D_OUT)
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in coder.state_dict().items()}
    dense_loss(parameters, x_BD, y_BD).backward()
    wanted = {name: tensor.grad for name, tensor in parameters.items()}
    wanted["W_dec"] -= (wanted["W_dec"] * coder.W_dec).sum(1, keepdim=True) * coder.W_dec  # the norm undoes this
    step = Step(coder, Adam((0.0, 0.999), 1e-8), kernels=kernels)  # with β₁ = 0 the first moment is the gradient
    step(x_BD, 1.0, y_BD)
    assert set(wanted) == set(step.moments)
    for name, want in wanted.items():
        torch.testing.assert_close(step.moments[name].first, want, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("skip", [False, True])
def test_it_learns_a_map_that_is_sparse_and_affine(kernels, activation, skip):
    """y has 4 of 24 directions for x's active features, plus an affine part, which the skip finds."""
    W_in, W_out, affine = randn(10, 24, D_IN), randn(11, 24, D_OUT), 0.5 * randn(12, D_OUT, D_IN)
    coder = initialize_transcoder(48, 6, torch.zeros(D_IN, device=DEVICE), torch.zeros(D_OUT, device=DEVICE), 0, "t",
                                  skip=skip)
    step = Step(coder, Adam((0.9, 0.999), 1e-8, scale_biases=True), kernels=kernels, activation=activation,
                auxiliary=SettledAuxiliary(weight=0.125, k=6, dead_window=2000, lift=0.1), matryoshka=(0.25,))
    losses = []
    for number in range(150):
        z_BF = randn(100 + number, 64, 24).relu() * (randn(1000 + number, 64, 24) > 1)
        x_BD = z_BF @ W_in + 0.1 * randn(2000 + number, 64, D_IN)
        step(x_BD.float(), 1e-2, (z_BF @ W_out + x_BD @ affine.T).float())
        losses.append(step.take_sums().loss / 64)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    if skip:
        assert coder.W_skip.norm() > 0.3 * affine.norm()


