"""The Triton kernels: compiled for an H100, and in Triton's interpreter, where the tests of values and gradients run
again in a process that has TRITON_INTERPRET=1 from its start. On a machine with a GPU they run on it as well."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_backends import TESTS

triton = pytest.importorskip("triton")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def run_again(**environment: str) -> None:
    environment = os.environ | {"KERNELS_UNDER_TEST": "cuda", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "cuda", *TESTS]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


FLOAT, HALF, INT64, INT32 = "*fp32", "*bf16", "*i64", "*i32"
PAIRS = {"rows_P": INT64, "values_P": FLOAT, "gradients_P": FLOAT, "e_BD": FLOAT, "u_BD": FLOAT}
UPDATE = PAIRS | {"W_FD": FLOAT, "first_FD": FLOAT, "second_FD": FLOAT, "offsets": INT64, "parts_PD": FLOAT,
                  "part_offsets": INT64, "bounds_S": INT32, "db_latent_F": FLOAT, "db_pull_SD": FLOAT, "numbers": FLOAT}
RESIDUAL = {"x_BD": FLOAT, "values_BK": FLOAT, "indices_BK": INT64, "W_FD": FLOAT, "b_pre_D": FLOAT, "loss_B": "*fp64",
            "e_BD": FLOAT, "dz_BK": FLOAT, "tiny": FLOAT}
ERROR = {"x_BD": FLOAT, "xhat_BD": FLOAT, "loss_B": "*fp64", "e_BD": FLOAT, "tiny": FLOAT}
SELECT = {"pre_BF": FLOAT, "chosen_BK": INT32, "values_BK": FLOAT, "indices_BK": INT64}
UPDATE_CONSTANTS = {"DECODER": True, "ENCODER": True, "TOUCHED": False, "HALF": False, "MIX1": 0x85EBCA6B,
                    "MIX2": 0xC2B2AE35, "D": 4096}


@pytest.mark.parametrize(("name", "pointers", "constants"), [
    ("group_maxima", {"pre_BF": FLOAT, "bias_F": FLOAT, "maxima_BG": FLOAT}, {"GROUP": 32, "GROUPS_AT_ONCE": 128}),
    ("select_groups", {"maxima_BG": FLOAT, "chosen_BK": INT32}, {"BITS": 32, "GROUPS": 8192}),
    ("select_elements", SELECT | {"bias_F": FLOAT}, {"BIAS": True, "BITS": 32, "GROUP": 32, "K": 64}),
    ("select_elements", SELECT, {"bias_F": None, "BIAS": False, "BITS": 32, "GROUP": 32, "K": 64}),
    ("residual", RESIDUAL | {"mean_B": FLOAT, "std_B": FLOAT}, {"LAYER_NORM": True, "K": 64, "TILE": 128}),
    ("residual", RESIDUAL, {"mean_B": None, "std_B": None, "LAYER_NORM": False, "K": 128, "TILE": 64}),
    ("error", ERROR | {"mean_B": FLOAT, "std_B": FLOAT}, {"LAYER_NORM": True, "TILE": 4096}),
    ("error", ERROR, {"mean_B": None, "std_B": None, "LAYER_NORM": False, "TILE": 4096}),
    ("decode", {name: RESIDUAL[name] for name in ("values_BK", "indices_BK", "W_FD")} | {"xhat_BD": FLOAT},
     {"K": 64, "TILE": 64}),
    ("code_gradient", {name: RESIDUAL[name] for name in ("e_BD", "values_BK", "indices_BK", "W_FD", "dz_BK")},
     {"K": 64, "TILE": 64}),
    ("sum_parts", PAIRS | {"parts_PD": FLOAT, "latents_P": INT64, "starts_P": INT64, "stops_P": INT64},
     {"DECODER": True, "ENCODER": True, "D": 4096}),
    ("update_rows", UPDATE, UPDATE_CONSTANTS | {"updated_F": None}),
    ("update_rows", UPDATE | {"updated_F": INT32}, UPDATE_CONSTANTS | {"TOUCHED": True}),
    ("update_rows", UPDATE | {"first_FD": HALF, "second_FD": HALF},
     UPDATE_CONSTANTS | {"updated_F": None, "HALF": True}),
    ("update_rows", UPDATE, UPDATE_CONSTANTS | {"updated_F": None, "DECODER": False, "e_BD": None}),
    ("update_rows", UPDATE, UPDATE_CONSTANTS | {"updated_F": None, "ENCODER": False, "u_BD": None}),
    ("quantize_rows", {"rows_RD": FLOAT, "whole_RD": "*i8", "scales_R": FLOAT}, {"D": 4096, "SHIFT": 1.5 * 2**23}),
    ("scale_sums", {"sums_CF": INT32, "pre_CF": FLOAT, "maxima_CG": FLOAT, "scales_F": FLOAT, "input_scales_C": FLOAT,
                    "bias_F": FLOAT}, {"GROUP": 32, "GROUPS_AT_ONCE": 128}),
    ("exact_scores", {"u_CD": FLOAT, "W_FD": FLOAT, "b_F": FLOAT, "chosen_CM": INT64, "exact_CM": FLOAT},
     {"M": 128, "TILE": 64}),
])
def test_compiles_for_an_h100(name, pointers, constants, tmp_path, monkeypatch):
    """Compile to machine code for compute capability 9.0, at the block sizes of the full size; this needs no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = "cuda_candidates_kernels" if name in ("quantize_rows", "scale_sums", "exact_scores") else "cuda_kernels"
    kernel = getattr(importlib.import_module(f"olmoscope.kernels.{module}"), name)
    signature = {argument: "constexpr" if argument in constants else pointers.get(argument, "i32")
                 for argument in kernel.arg_names}
    values = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    built = triton.compile(triton.compiler.ASTSource(kernel, signature=signature, constexprs=values),
                           target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert built.asm["cubin"]


def test_in_the_interpreter():
    run_again(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_the_gpu():
    run_again(KERNELS_UNDER_TEST_DEVICE="cuda")
