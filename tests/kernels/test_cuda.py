"""What only a GPU can show: the product in bfloat16, the same bits each time, and that a step never waits."""

import pytest
import torch

from olmoscope.kernels.dispatch import kernels_for
from olmoscope.recipe.schema import Candidates
from olmoscope.train.adam import Adam
from olmoscope.train.initialize import initialize
from olmoscope.train.step import Step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
CUDA = torch.device("cuda")


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(CUDA)


@pytest.mark.parametrize(("rows", "d_model", "latents", "k"),
                         [(1, 1, 1, 1), (3, 7, 33, 5), (257, 96, 5001, 32), (64, 1000, 20000, 300)])
def test_encode_with_the_product_in_bfloat16(rows, d_model, latents, k):
    u_BD, W_FD, b_F = randn(0, rows, d_model), randn(1, latents, d_model), randn(2, latents) * 0.1
    values_BK, indices_BK = kernels_for(CUDA).encode_topk(u_BD, W_FD, b_F, k)
    pre_BF = u_BD.double() @ W_FD.double().T + b_F
    scale = d_model**0.5 * 0.02
    torch.testing.assert_close(values_BK.double(), pre_BF.gather(1, indices_BK).relu(), rtol=0.01, atol=scale)
    torch.testing.assert_close(values_BK.double(), pre_BF.topk(k).values.relu(), rtol=0.01, atol=scale)
    assert all(len(row.unique()) == k for row in indices_BK)


def steps(candidates: Candidates | None, adam: Adam) -> Step:
    step = Step(initialize(256, 4096, 16, "none", torch.zeros(256, device=CUDA), 0), adam, candidates=candidates)
    for seed in range(3):
        step(randn(seed, 300, 256), lr=1e-3)
    return step


@pytest.mark.parametrize("candidates", [None, Candidates()])
@pytest.mark.parametrize("adam", [Adam((0.9, 0.999), 1e-8), Adam((0.9, 0.999), 1e-8, "touched", "bfloat16")])
def test_steps_give_the_same_bits_each_time_and_never_wait(candidates, adam):
    first, second = steps(candidates, adam), steps(candidates, adam)
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())
    x_BD = randn(9, 300, 256)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            first(x_BD, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_product_in_8_bits_is_exact():
    """Whole numbers in batches of any size, even sizes that the library's own product does not accept."""
    from olmoscope.kernels.cuda_candidates import _product

    for rows, d_model, latents in ((1, 1, 1), (17, 24, 40), (33, 100, 1001)):
        inputs_CD, weights_FD = (torch.randint(-127, 128, shape, dtype=torch.int8)
                                 for shape in ((rows, d_model), (latents, d_model)))
        got = _product(inputs_CD.to(CUDA), weights_FD.to(CUDA))
        assert torch.equal(got.cpu(), inputs_CD.int() @ weights_FD.int().T)
