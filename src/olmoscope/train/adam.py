"""Adam on a piece of a parameter at a time, so that a gradient can be used up while it is in cache."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Adam:
    """Adam's settings (Kingma & Ba 2015, arXiv:1412.6980); equal to torch.optim.Adam without weight decay."""

    betas: tuple[float, float]
    eps: float

    def update_(self, parameter: Tensor, gradient: Tensor, moments: "Moments", lr: float, step: int) -> None:
        """One step, in place, on tensors of one shape.

        Args:
            step: counted from 1, for the bias correction.
        """
        beta1, beta2 = self.betas
        moments.first.lerp_(gradient, 1 - beta1)
        moments.second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = moments.second.sqrt().div_((1 - beta2**step) ** 0.5).add_(self.eps)
        parameter.addcdiv_(moments.first, root, value=-lr / (1 - beta1**step))


@dataclass(frozen=True)
class Moments:
    """Adam's running means of the gradient and of its square."""

    first: Tensor
    second: Tensor

    @classmethod
    def zeros_like(cls, parameter: Tensor) -> "Moments":
        return cls(torch.zeros_like(parameter), torch.zeros_like(parameter))

    def __getitem__(self, part: slice) -> "Moments":
        return Moments(self.first[part], self.second[part])
