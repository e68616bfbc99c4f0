"""A separate process compiles kernels once, so the first training on a machine has the same bits as the second."""

import os
import subprocess
import sys

import pytest
import torch

from olmoscope.kernels import prepare

TRAIN = """
import hashlib
import olmoscope
import torch
from olmoscope.kernels.prepare import prepare_kernels
from olmoscope.recipe.schema import Candidates
from olmoscope.train.initialize import initialize
from olmoscope.train.adam import Adam
from olmoscope.train.derived import SettledAuxiliary
from olmoscope.train.step import Step

prepare_kernels(torch.device("cpu"), candidates=True)
for candidates in (None, Candidates()):
    generator = torch.Generator().manual_seed(0)
    sae = initialize(256, 2048, 32, "none", torch.zeros(256), seed=0, tied=False)
    step = Step(sae, Adam((0.9, 0.999), 1e-8), SettledAuxiliary(k=8, dead_window=300), candidates=candidates)
    for _ in range(6):
        step(torch.randn(256, 256, generator=generator), lr=1e-3)
    for name, tensor in step.tensors().items():
        print(name, hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_the_process_that_finds_nothing_compiled_gives_the_same_bits(tmp_path):
    ran = [subprocess.run([sys.executable, "-c", TRAIN], env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
                          capture_output=True, text=True, check=True) for _ in range(2)]
    assert [process.stderr.count("compiling kernels, once on this machine ...") for process in ran] == [1, 0]
    assert "W_enc" in ran[0].stdout and ran[0].stdout == ran[1].stdout


def test_nothing_is_compiled_where_other_kernels_are_used(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **settings: pytest.fail("it compiles"))
    monkeypatch.setattr(prepare, "_mark", lambda candidates: pytest.fail("it looks for compiled kernels"))
    prepare.prepare_kernels(torch.device("meta"))
    monkeypatch.setenv("OLMOSCOPE_KERNELS", "reference")
    prepare.prepare_kernels(torch.device("cpu"))
