"""Adam's settings and state."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from olmoscope.kernels.interface import AdamStep, Moments
from olmoscope.train.derived import Settled


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980): as torch.optim.Adam without weight decay, or a cheaper variant."""

    betas: tuple[float, float]
    eps: float
    rows: Literal["exact", "touched"] = "exact"
    """`touched`: only rows of a matrix with an active pair in the batch are updated. The moments of the other rows
    decay as in exact Adam (the decay is made up when the row is next touched), but momentum does not move them."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the matrices' moments; moments of biases always have the parameters' dtype."""
    decoder_rate: float = 1.0
    """The learning rate of an untied decoder, as a multiple of the other rates."""
    scale_biases: bool = False
    """Whether the learning rate of the biases is in units of the activations' RMS."""

    @classmethod
    def of(cls, train: Settled) -> "Adam":
        """The settings of a recipe."""
        return cls(train.betas, train.eps, train.adam, train.moments, train.decoder_rate, train.scale_biases)

    def at(self, count: int, lr: float) -> AdamStep:
        """The arguments of step number `count`, counted from 1."""
        return AdamStep(lr, *self.betas, self.eps, count)

    def moments_of(self, name: str, parameter: Tensor) -> Moments:
        """Fresh moments: in the dtype of the settings for a dictionary's matrix, in its own for a bias or a skip."""
        return self._matrix_moments(parameter) if name in ("W", "W_enc", "W_dec") else plain_moments(parameter)

    def _matrix_moments(self, W_FD: Tensor) -> Moments:
        dtype = torch.bfloat16 if self.moments == "bfloat16" else W_FD.dtype
        updated_F = torch.zeros(len(W_FD), dtype=torch.int32, device=W_FD.device) if self.rows == "touched" else None
        return Moments(torch.zeros_like(W_FD, dtype=dtype), torch.zeros_like(W_FD, dtype=dtype), updated_F)


def plain_moments(parameter: Tensor) -> Moments:
    """Fresh moments in the parameter's own dtype."""
    return Moments(torch.zeros_like(parameter), torch.zeros_like(parameter))


def update_parameter(parameter: Tensor, gradient: Tensor, moments: Moments, adam: AdamStep) -> None:
    """Take one step of Adam, in place. All tensors have the same shape."""
    moments.first.lerp_(gradient, 1 - adam.beta1)
    moments.second.mul_(adam.beta2).addcmul_(gradient, gradient, value=1 - adam.beta2)
    root = moments.second.sqrt().mul_(adam.root_scale).add_(adam.eps)
    parameter.addcdiv_(moments.first, root, value=-adam.rate)
