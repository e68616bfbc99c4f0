"""What the CPU kernels promise beyond the right values: the same bits on any number of threads, and a compile cache."""

import os
import subprocess
import sys

import pytest
import torch

from olmoscope.errors import UserError
from olmoscope.kernels import cpu, cpu_topk, reference
from olmoscope.kernels.compile import call, compiled
from olmoscope.kernels.dispatch import kernels_for
from olmoscope.kernels.interface import AdamStep, Moments


@pytest.fixture
def threads():
    """Sets torch's (and so the kernels') number of threads, and restores it afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def float32_step(moments_dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    W_FD = torch.nn.functional.normalize(torch.randn(3000, 40, generator=generator))
    x_BD = torch.randn(1500, 40, generator=generator)
    pre_BF = x_BD @ W_FD.T
    pre_BF[:, 7] = 100  # active in every row
    values_BK, indices_BK = torch.empty(1500, 6), torch.empty(1500, 6, dtype=torch.int64)
    call(cpu_topk.topk, pre_BF, values_BK, indices_BK)
    residual = cpu.residual(x_BD, values_BK, indices_BK, W_FD, torch.zeros(40), None, None)
    pairs = cpu.sort_pairs(values_BK, residual.dz_BK, indices_BK, 3000)
    moments = Moments(torch.zeros_like(W_FD, dtype=moments_dtype), torch.zeros_like(W_FD, dtype=moments_dtype))
    sums = cpu.update_tied(W_FD, moments, pairs, residual.e_BD, x_BD, AdamStep(1e-3, 0.9, 0.999, 1e-8, 1))
    return [values_BK, indices_BK, *vars(residual).values(), W_FD, moments.first, moments.second, *sums]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(threads, dtype):
    threads(1)
    one = float32_step(dtype)
    threads(min(3, os.cpu_count() or 1))
    assert all(torch.equal(a, b) for a, b in zip(one, float32_step(dtype), strict=True))


def test_candidates_are_the_same_bits_on_any_number_of_threads(threads):
    generator = torch.Generator().manual_seed(0)
    W_FD, u_BD = torch.randn(1000, 40, generator=generator), torch.randn(600, 40, generator=generator)
    found = []
    for count in (1, min(3, os.cpu_count() or 1)):
        threads(count)
        quantized = cpu.quantize(W_FD)
        found.append((*vars(quantized).values(), *cpu.encode_candidates(u_BD, W_FD, W_FD[:, 0], quantized, 6, 10)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_of_equal_latents_the_first_ones_are_chosen():
    u_BD, W_FD = torch.ones(2, 3), torch.ones(1500, 3)
    values_BK, indices_BK = cpu.encode_topk(u_BD, W_FD, torch.zeros(1500), 5)
    assert torch.equal(indices_BK.sort(dim=1).values, torch.arange(5).expand(2, 5))
    assert (values_BK == 3).all()


@pytest.mark.parametrize("where", ["row", "latent"])
def test_nan_shows_and_nothing_is_read_out_of_bounds(where):
    u_BD, W_FD = torch.randn(4, 8), torch.randn(1200, 8)
    (u_BD if where == "row" else W_FD)[0] = float("nan")
    values_BK, indices_BK = cpu.encode_topk(u_BD, W_FD, torch.zeros(1200), 1200)
    assert values_BK[0].isnan().all()
    assert ((indices_BK >= 0) & (indices_BK < 1200)).all()
    residual = cpu.residual(torch.randn(4, 8), values_BK, indices_BK, W_FD, torch.zeros(8), None, None)
    assert residual.loss_B[0].isnan()


def test_float32_agrees_with_float64():
    generator = torch.Generator().manual_seed(1)
    u_BD, W_FD = torch.randn(300, 64, generator=generator), torch.randn(5000, 64, generator=generator)
    values_BK, indices_BK = cpu.encode_topk(u_BD, W_FD, torch.zeros(5000), 32)
    want = reference.encode_topk(u_BD.double(), W_FD.double(), torch.zeros(5000).double(), 32)
    torch.testing.assert_close(values_BK.double(), want[0], rtol=1e-5, atol=1e-5)
    assert (indices_BK == want[1]).double().mean() > 0.99


def test_dispatch(monkeypatch):
    assert kernels_for(torch.device("cpu")) is cpu
    monkeypatch.setenv("OLMOSCOPE_KERNELS", "reference")
    assert kernels_for(torch.device("cpu")) is reference
    monkeypatch.setenv("OLMOSCOPE_KERNELS", "cuda")
    with pytest.raises(UserError, match="do not run on cpu"):
        kernels_for(torch.device("cpu"))
    monkeypatch.setenv("OLMOSCOPE_KERNELS", "fastest")
    with pytest.raises(UserError, match="no such kernels; choose from reference, cpu, cuda"):
        kernels_for(torch.device("cpu"))


CACHED = """
from olmoscope.kernels.compile import compiled

@compiled()
def twice(x):
    return 2 * x

print(twice(4))
"""


@pytest.mark.slow
def test_compiled_kernels_are_kept_where_one_says(tmp_path):
    (tmp_path / "program.py").write_text(CACHED)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for _ in range(2):
        done = subprocess.run([sys.executable, tmp_path / "program.py"], env=environment, capture_output=True,
                              text=True)
        assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
    assert len(list((tmp_path / "cache").rglob("*.nbc"))) == 1


def test_without_a_folder_for_the_cache_it_says_so_and_works():
    scope = {}
    exec("def twice(x):\n    return 2 * x\n", scope)  # a function without a file has no place for a cache
    with pytest.warns(UserWarning, match="set NUMBA_CACHE_DIR to a writable folder"):
        assert compiled()(scope["twice"])(4) == 8


def test_the_command_line_does_not_import_the_compiler():
    code = "import sys, olmoscope.cli.app, olmoscope.kernels.dispatch; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
