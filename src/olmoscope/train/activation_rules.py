"""Activation rules for training (TopK, BatchTopK, JumpReLU, group-max): which latents are active, what a rule learns.

All rules give a batch's codes as `[B, K]` values and latents, with inactive places (value 0) after the active ones. So
everything that follows (kernels, gradients, optimiser) is the same for all rules. p are the pre-activations,
u W_encᵀ + b_latent.

TopK        the k largest p of each row, after the ReLU.
Group-max   the largest p of each of k groups (sae/groupmax.py).
BatchTopK   the B·k largest p of the batch (Bussmann et al. 2024, arXiv:2412.06410), so the smallest of them is a single
            threshold for all latents; its running mean is the threshold of the trained SAE, a JumpReLU.
JumpReLU    p > θ_j, a threshold for each latent, learned (Rajamanoharan et al. 2024, arXiv:2407.14435).

BatchTopK and JumpReLU consider the `CAP · k` largest p of each row, so no row has more active latents than that.

JumpReLU: a step function has no gradient, so the gradient of the thresholds is estimated from the p near them (a
straight-through estimator with a rectangular kernel of width ε_j = `BANDWIDTH` · θ_j). With s = dS/dL0 for the sparsity
loss S = `SPARSITY` (L0/k − 1)², and θ_j = exp(t_j), so that steps of t_j are relative changes of θ_j:

    dL/dt_j = −1/`BANDWIDTH` Σ_b (θ_j dL/dz_bj + s/B) + `DRIFT`/F   over rows with |p_bj − θ_j| < ε_j/2

The last term is the gradient of a loss `DRIFT` · mean of t. A latent whose p is not near its threshold in any row has
no other gradient, so its threshold falls until some p is near it. Without this term, a tenth of the latents died. The
first batch sets all thresholds to BatchTopK's, so L0 starts at k and needs no warm-up. Inactive latents need dL/dz too:
those just under their thresholds get the value `BARELY`, which adds nothing when decoded, and the kernels give their
dL/dz.

Shapes: B rows, D d_model, F latents, K places.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from olmoscope.kernels.interface import AdamStep, Kernels
from olmoscope.sae.groupmax import encode_groups
from olmoscope.sae.io.checkpoint import THRESHOLDS
from olmoscope.sae.topk import TopK
from olmoscope.train.adam import plain_moments, update_parameter

EncodeTopK = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""`Kernels.encode_topk` with the SAE's encoder: it takes u_BD, b_latent_F and k."""

CAP = 4
"""The largest number of active latents in a row, as a multiple of k."""
THRESHOLD_RATE = 0.05
"""Weight of a new batch in the running mean of BatchTopK's threshold; the n-th batch has the weight 1/n if that is
larger."""
BANDWIDTH = 0.5
"""Width of the thresholds' kernel, as a share of the threshold."""
SPARSITY = 3.0
"""Weight of JumpReLU's sparsity loss, the square of L0's relative distance from its target k."""
THRESHOLDS_RATE = 0.03
"""Learning rate of the thresholds' logarithms, as a multiple of D times the matrices' rate, which falls with D
(derived.py)."""
DRIFT = 0.005
"""Weight of the mean of the thresholds' logarithms in JumpReLU's loss."""
BARELY = 1e-30
"""Positive, and lost in rounding when added to any usual number."""


class TopKRule:
    """k active latents per row; nothing to learn. The other rules override what differs.

    Args:
        latents: number of latents of the whole SAE if `sae` is a shard (sharded_rules.py); None if `sae` is whole.
    """

    def __init__(self, sae: TopK, kernels: Kernels, encode_topk: EncodeTopK, latents: int | None = None) -> None:
        self.sae, self.kernels, self.encode_topk = sae, kernels, encode_topk
        self.latents = latents or sae.d_sae
        self.places = min(self.latents, sae.k)
        """How many latents of a row the rule considers."""

    def start(self, u_BD: Tensor) -> None:
        """Prepare for training, given its first batch."""

    def candidates(self, u_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The latents that the rule considers: for each, the quantity that decides whether it is active, in descending
        order and 0 if it cannot be active, `[B, K]`; and its number, `[B, K]` int64."""
        return self._first(u_BD, self.sae.b_latent)

    def encode(self, u_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of a batch: values and latents, each `[B, K]`."""
        return self.candidates(u_BD)

    def capped(self, values_BK: Tensor) -> Tensor | int:
        """The number of rows in which the cap may have removed active latents."""
        return 0

    def learn(self, values_BK: Tensor, dz_BK: Tensor, indices_BK: Tensor, adam: AdamStep,
              active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Learn from dL/dz of the codes that `encode` gave.

        Args:
            active: how many latents are active in all rows and shards, a scalar; None to count those of `values_BK`.

        Returns:
            values_BK and dz_BK for the other parameters' gradients.
        """
        return values_BK, dz_BK

    def tensors(self) -> dict[str, Tensor]:
        """All state, by name."""
        return self.shared_tensors() | self.tensors_of_latents()

    def shared_tensors(self) -> dict[str, Tensor]:
        """The state that does not belong to single latents."""
        return {}

    def tensors_of_latents(self) -> dict[str, Tensor]:
        """The state of each latent, `[F]`."""
        return {}

    def _first(self, u_BD: Tensor, b_latent_F: Tensor) -> tuple[Tensor, Tensor]:
        """The latents with the largest pre-activations, as many as the rule considers."""
        return self.encode_topk(u_BD, b_latent_F, min(self.places, self.sae.d_sae))


class GroupMaxRule(TopKRule):
    """The largest latent of each group; a shard has whole groups."""

    def candidates(self, u_BD: Tensor) -> tuple[Tensor, Tensor]:
        groups = self.sae.k * self.sae.d_sae // self.latents
        return encode_groups(self.kernels, u_BD, self.sae.W_enc, self.sae.b_latent, groups)


class CappedRule(TopKRule):
    """Any number of active latents per row, up to a cap."""

    def __init__(self, sae: TopK, kernels: Kernels, encode_topk: EncodeTopK, latents: int | None = None) -> None:
        super().__init__(sae, kernels, encode_topk, latents)
        self.places = min(self.latents, CAP * sae.k)

    def capped(self, values_BK: Tensor) -> Tensor | int:
        return (values_BK[:, -1] > BARELY).sum() if self.places < self.latents else 0


class BatchTopKRule(CappedRule):
    """k active latents per row on average over the batch."""

    def __init__(self, sae: TopK, kernels: Kernels, encode_topk: EncodeTopK, latents: int | None = None) -> None:
        super().__init__(sae, kernels, encode_topk, latents)
        device = sae.W_dec.device
        self.threshold = torch.zeros((), dtype=torch.float64, device=device)
        """Running mean of the batches' thresholds."""
        self.batches = torch.zeros((), dtype=torch.float64, device=device)

    def encode(self, u_BD: Tensor) -> tuple[Tensor, Tensor]:
        values_BK, indices_BK = self.candidates(u_BD)
        least = smallest_of_largest(values_BK, self.sae.k)
        self.note(least)
        return self.keep(values_BK, least), indices_BK

    def note(self, least: Tensor) -> None:
        """Add a batch's threshold to the running mean."""
        self.batches += 1
        self.threshold.lerp_(least.double(), (1 / self.batches).clamp_min(THRESHOLD_RATE))

    def keep(self, values_BK: Tensor, least: Tensor) -> Tensor:
        """The activations that reach the threshold `least`; the others become 0."""
        return torch.where(values_BK < least, 0, values_BK)  # NaN stays, and is seen in the loss

    def shared_tensors(self) -> dict[str, Tensor]:
        return {THRESHOLDS["batchtopk"]: self.threshold, "batches": self.batches}


class JumpReLURule(CappedRule):
    """A learned threshold for each latent."""

    def __init__(self, sae: TopK, kernels: Kernels, encode_topk: EncodeTopK, latents: int | None = None) -> None:
        super().__init__(sae, kernels, encode_topk, latents)
        self.log_threshold_F = torch.zeros_like(sae.b_latent)
        self.moments = plain_moments(self.log_threshold_F)

    def start(self, u_BD: Tensor) -> None:
        values_BK, _ = self.activations(u_BD)
        self.begin(smallest_of_largest(values_BK, self.sae.k))

    def activations(self, u_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Like `candidates`, but chosen by the pre-activations alone."""
        return self._first(u_BD, self.sae.b_latent)

    def begin(self, least: Tensor) -> None:
        """Set all thresholds to a batch's threshold."""
        self.log_threshold_F.copy_(least.clamp_min(torch.finfo(least.dtype).eps).log())

    def candidates(self, u_BD: Tensor) -> tuple[Tensor, Tensor]:
        # With this bias, the kernel's ReLU keeps what is above the lower end of the band, sorted by distance from it.
        threshold_F = self.log_threshold_F.exp()
        return self._first(u_BD, self.sae.b_latent - threshold_F * (1 - BANDWIDTH / 2))

    def encode(self, u_BD: Tensor) -> tuple[Tensor, Tensor]:
        over_BK, indices_BK = self.candidates(u_BD)
        return self.keep(over_BK, indices_BK), indices_BK

    def keep(self, over_BK: Tensor, indices_BK: Tensor) -> Tensor:
        """The activations that are above their thresholds; `BARELY` for those just under them."""
        threshold_F = self.log_threshold_F.exp()
        lower_F = threshold_F * (1 - BANDWIDTH / 2)
        active_BK = over_BK > (threshold_F - lower_F)[indices_BK]
        barely_BK = torch.where(over_BK > 0, BARELY, over_BK)
        return torch.where(active_BK, over_BK + lower_F[indices_BK], barely_BK)

    def learn(self, values_BK: Tensor, dz_BK: Tensor, indices_BK: Tensor, adam: AdamStep,
              active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        active_BK = values_BK > BARELY
        rows, k = len(values_BK), self.sae.k
        total = active_BK.sum(dtype=dz_BK.dtype) if active is None else active.to(dz_BK.dtype)
        slope = 2 * SPARSITY / k * (total / (rows * k) - 1)
        threshold_F = self.log_threshold_F.exp()
        threshold_BK = threshold_F[indices_BK]
        near_BK = (values_BK > 0) & (values_BK < threshold_BK * (1 + BANDWIDTH / 2))
        pull_BK = (threshold_BK * dz_BK + slope / rows) * (-1 / BANDWIDTH)
        pairs = self.kernels.sort_pairs(near_BK.to(dz_BK.dtype), pull_BK, indices_BK, self.sae.d_sae)
        gradient_F = torch.segment_reduce(pairs.gradients, "sum", offsets=pairs.offsets, initial=0, unsafe=True)
        gradient_F += DRIFT / self.latents
        lr = adam.lr * THRESHOLDS_RATE * self.sae.W_enc.shape[1]
        update_parameter(self.log_threshold_F, gradient_F, self.moments, replace(adam, lr=lr))
        return torch.where(active_BK, values_BK, 0), torch.where(active_BK, dz_BK, 0)

    def tensors_of_latents(self) -> dict[str, Tensor]:
        name = THRESHOLDS["jumprelu"]
        return {name: self.log_threshold_F, f"{name}.first": self.moments.first, f"{name}.second": self.moments.second}


def smallest_of_largest(values_BK: Tensor, k: int) -> Tensor:
    """The B·k-th largest of the values, a scalar; 0 if fewer are positive."""
    others = values_BK.numel() - len(values_BK) * k
    return values_BK.flatten().kthvalue(others + 1).values


RULES = {"topk": TopKRule, "batchtopk": BatchTopKRule, "jumprelu": JumpReLURule, "groupmax": GroupMaxRule}
