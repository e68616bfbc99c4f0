"""Coders of every kind with random parameters, and the same maths in plain dense torch, which autograd knows.

Shapes: N rows, D_in width read, D_out width written, F latents.
"""

from typing import Any

import torch
from torch import Tensor

from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.groupmax import GroupMax
from olmoscope.sae.threshold import Gated, JumpReLU
from olmoscope.sae.topk import TopK

KINDS = {"topk": TopK, "groupmax": GroupMax, "jumprelu": JumpReLU, "gated": Gated}
OWN = {"topk": ("b_latent",), "groupmax": ("b_latent",), "jumprelu": ("b_latent", "threshold"),
       "gated": ("b_gate", "b_mag", "r_mag")}
WITHOUT_GRADIENT = ("threshold", "b_gate")
K = 4


def parameters(kind: str, d_in: int, d_out: int, F: int, *, seed: int = 0, ends: str = "same", tied: bool = False,
               dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Parameters by the names of `state_dict`. ends: `same` for an SAE, `other` for a transcoder, `skip` for one with
    W_skip."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    found = {"W": randn(F, d_in)} if tied else {"W_enc": randn(F, d_in), "W_dec": randn(F, d_out)}
    found |= {name: randn(F) * 0.3 for name in OWN[kind]}
    if kind == "jumprelu":
        found["threshold"] = found["threshold"].abs() + 1
    found |= {"b_pre": randn(d_in)} if ends == "same" else {"b_in": randn(d_in), "b_out": randn(d_out)}
    return found | ({"W_skip": randn(d_out, d_in)} if ends == "skip" else {})


def settings(kind: str, normalize: str = "none", ends: str = "same") -> dict[str, Any]:
    return {"normalize": normalize, "transcoder": ends != "same"} | ({"k": K} if kind in ("topk", "groupmax") else {})


def coder_of(kind: str, state: dict[str, Tensor], normalize: str = "none", ends: str = "same") -> SparseCoder:
    return KINDS[kind].from_state_dict(state, **settings(kind, normalize, ends))


def dense(kind: str, state: dict[str, Tensor], x_ND: Tensor, normalize: str = "none",
          ends: str = "same") -> tuple[Tensor, Tensor]:
    """z `[N, F]` and y `[N, D_out]`."""
    W_enc, W_dec = (state.get("W", state.get(name)) for name in ("W_enc", "W_dec"))
    b_in, b_out = (state.get("b_pre", state.get(name)) for name in ("b_in", "b_out"))
    mean_N1, divisor_N1, std_N1 = 0.0, 1.0, 1.0
    if normalize in ("layer_norm", "centred"):
        mean_N1 = x_ND.mean(1, keepdim=True)
    if normalize == "layer_norm":
        std_N1 = (x_ND - mean_N1).square().sum(1, keepdim=True).div(x_ND.shape[1] - 1).sqrt()
        divisor_N1 = std_N1 + 1e-5
    if normalize == "constant_norm_rescale":
        divisor_N1 = std_N1 = x_ND.square().sum(1, keepdim=True).sqrt() / x_ND.shape[1] ** 0.5
    p_NF = ((x_ND - mean_N1) / divisor_N1 - b_in) @ W_enc.T
    if kind == "gated":
        z_NF = (p_NF + state["b_gate"] > 0) * torch.relu(p_NF * state["r_mag"].exp() + state["b_mag"])
    else:
        p_NF = p_NF + state["b_latent"]
        z_NF = _kept(kind, p_NF, state) * torch.relu(p_NF)
    y_ND = z_NF @ W_dec + b_out
    if "W_skip" in state:
        y_ND = y_ND + x_ND @ state["W_skip"].T
    return z_NF, y_ND * std_N1 + mean_N1 if ends == "same" else y_ND


def _kept(kind: str, p_NF: Tensor, state: dict[str, Tensor]) -> Tensor:
    if kind == "jumprelu":
        return p_NF > state["threshold"]
    if kind == "topk":
        return torch.zeros_like(p_NF).scatter(1, p_NF.topk(K).indices, 1)
    p_NGS = p_NF.unflatten(1, (K, -1))
    return torch.zeros_like(p_NGS).scatter(2, p_NGS.argmax(2, keepdim=True), 1).flatten(1)
