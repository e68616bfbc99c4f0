"""Latents for attention sinks: a few fixed directions that reconstruct rows of huge norm almost exactly.

In most language models some rows, above all those at the first position, have a norm tens or hundreds of times the
median, along nearly one direction (attention sinks; massive activations: Sun et al. 2024, arXiv:2402.17762). A loss
that measures a row's error relative to the row learns little from them, and a relatively small error there is many
times an ordinary row: spliced into the model, it does more harm than all other errors together.

So these directions are found before training (train/find_sinks.py), and each has its own latent, which is not trained.
With c_j a row's coordinate along direction j, the latent is active only far out, and then reconstructs all of the
coordinate except its usual value:

    a_j = gain_j max(0, c_j − onset_j)        gain_j = (typical_j − usual_j) / (typical_j − onset_j)

The other latents are trained on what is left, x − Σ_j a_j direction_j, which is of ordinary size in every row. Their
encoder does not see the coordinates along the directions (the usual values replace them), so that a sink's size does
not reach them. All of this is linear where a latent is active, so the finished SAE is an ordinary one (`fold_sinks`):
every reader of its format computes the same.

Shapes: B rows, D width, F trained latents, S sink latents.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from olmoscope.sae.topk import TopK


@dataclass(frozen=True)
class Sinks:
    """The directions of a site's sinks, and when their latents are active."""

    directions_SD: Tensor
    """Unit rows."""
    coordinates_SD: Tensor
    """The dual basis: a row's products with these are its coordinates along the directions."""
    gain_S: Tensor
    onset_S: Tensor
    """The coordinate above which the latent is active."""
    usual_S: Tensor
    """The mean coordinate of ordinary rows."""

    @property
    def count(self) -> int:
        return len(self.gain_S)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return type(self)(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def split(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as the trained latents' encoder sees them, and the target of those latents, each `[B, D]`."""
        c_BS = x_BD @ self.coordinates_SD.T
        active_BS = self.gain_S * (c_BS - self.onset_S).clamp_min(0)
        return x_BD - (c_BS - self.usual_S) @ self.directions_SD, x_BD - active_BS @ self.directions_SD


def fold_sinks(sae: TopK, sinks: Sinks | None) -> TopK:
    """The finished SAE: the sinks' latents, then the trained ones, with an encoder for rows as they are.

    With P x = Σ_j c_j direction_j, the trained latents read x − P x + Σ_j usual_j direction_j. So their encoder is
    W (I − P), and W Σ_j (usual_j − c_j(b_pre)) direction_j is added to their bias.
    """
    if sinks is None:
        return sae
    W_FD, b_D = sae.W_enc.double(), sae.b_in.double()
    U_SD, E_SD = sinks.directions_SD.double(), sinks.coordinates_SD.double()
    gain_S, along_FS = sinks.gain_S.double(), W_FD @ U_SD.T
    b_sinks_S = gain_S * (E_SD @ b_D - sinks.onset_S)
    state = {
        "W_enc": torch.cat([gain_S[:, None] * E_SD, W_FD - along_FS @ E_SD]),
        "W_dec": torch.cat([U_SD, sae.W_dec.double()]),
        "b_latent": torch.cat([b_sinks_S, sae.b_latent.double() + along_FS @ (sinks.usual_S - E_SD @ b_D)]),
        "b_pre": b_D}
    return type(sae).from_state_dict({name: tensor.to(sae.dtype) for name, tensor in state.items()}, k=sae.k,
                                     normalize=sae.normalize)
