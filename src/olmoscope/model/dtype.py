"""The dtype in which a language model computes: `model.dtype: auto` becomes one that is fast on this machine.

A processor without bfloat16 instructions emulates them: the same matrix product takes ten times as long as in float32.
Every store and evaluation records what `auto` became, and a store keeps the dtype it was begun with, whichever machine
continues it.
"""

from typing import Literal

import torch

from olmoscope.processor import has
from olmoscope.progress import console
from olmoscope.recipe.schema import Model

ComputeDtype = Literal["bfloat16", "float32"]
CPU_FEATURES = ("avx512bf16", "amx-bf16", "bf16")
"""LLVM's names for the instructions that multiply bfloat16: AVX-512, AMX, ARM."""


def fast_dtype(device: torch.device) -> ComputeDtype:
    """bfloat16 if the hardware multiplies it natively, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        return "bfloat16" if any(map(has, CPU_FEATURES)) else "float32"
    return "float32"


def settle_model(model: Model, device: torch.device) -> Model:
    """The model with `dtype: auto` replaced by what is fast on the device; prints the choice."""
    if model.dtype != "auto":
        return model
    dtype = fast_dtype(device)
    why = "has" if dtype == "bfloat16" else "lacks"
    console.print(f"{model.name} computes in {dtype}: this {'GPU' if device.type == 'cuda' else 'processor'} {why} "
                  "bfloat16 instructions", highlight=False, markup=False)
    return model.model_copy(update={"dtype": dtype})
